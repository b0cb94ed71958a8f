"""The rollout engine as a child process: started, waited for, and ended with the run."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from longforge.errors import EngineError, RunError
from longforge.forge.code_search.isolation import die_with_parent
from longforge.forge.config import EngineConfig
from longforge.forge.engine_client import healthy

__all__ = ["EngineProcess"]

POLL_SECONDS = 0.05
STOP_SECONDS = 10.0

_READY = re.compile(r" at (http://\S+?)/v1\b")


class EngineProcess:
    """`longforge serve MODEL` on a free port of this machine, in a session of its own.

    What it prints goes to `log`; its first line tells the URL.
    """

    def __init__(self, model: Path, config: EngineConfig, log: Path) -> None:
        self._log = log
        self._config = config
        self._output: IO[bytes] = log.open("ab")
        self._from = self._output.tell()
        command = [sys.executable, "-m", "longforge.cli", "serve", str(model), "--name", "policy"]
        command += ["--port", "0", "--threads", str(config.threads), "--max-running", str(config.max_running)]
        # Sampling and training must agree about probabilities, and the trainer computes in fp32 on the CPU.
        command += ["--device", "cpu", "--dtype", "float32"]
        if config.pages is not None:
            command += ["--pages", str(config.pages)]
        # An idle pool of threads must not spin on the cores that the trainer uses, and the reverse.
        threads = str(config.threads)
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def wait_ready(self, between: Callable[[], None] = lambda: None) -> str:
        """Its base URL, once it answers. between: called while waiting; may raise.

        Errors: EngineError with the last thing it said if it ends or takes too long.
        """
        limit = time.monotonic() + self._config.start_seconds
        while time.monotonic() < limit:
            between()
            self.check()
            found = _READY.search(self._said())
            if found and healthy(found[1], seconds=5.0):
                return found[1]
            time.sleep(POLL_SECONDS)
        raise EngineError(f"engine: not ready after {self._config.start_seconds:g} s; see {self._log}")

    def check(self) -> None:
        """Raises EngineError if the engine has ended."""
        code = self._process.poll()
        if code is not None:
            lines = [line for line in self._said().splitlines() if line.strip()]
            last = lines[-1].removeprefix("longforge: ") if lines else f"see {self._log}"
            raise EngineError(f"engine: the server ended with code {code}: {last}")

    def stop(self) -> None:
        """Ends it: asked first, killed if it does not listen."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._output.close()

    def _said(self) -> str:
        try:
            with self._log.open("rb") as log:
                log.seek(self._from)
                return log.read().decode("utf-8", errors="replace")
        except FileNotFoundError:
            raise RunError(f"{self._log}: it was removed while the run was using it") from None
