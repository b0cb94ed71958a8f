"""`longforge serve` as a process of its own."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def longforge_serve(
    folder: Path, *options: str, before: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its base URL, once it is ready. before: Python that it runs first."""
    code = f"{before}\nfrom longforge.cli import main\nmain()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--name", "small", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--threads", "1", "--pages", "2100", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LONGFORGE_API_KEY": ""},
    )
    assert process.stdout is not None
    rest = threading.Thread(target=process.stdout.read, daemon=True)
    try:
        url = next(word for line in process.stdout for word in line.split() if word.startswith("http://"))
        rest.start()
        yield process, url.rstrip("/").removesuffix("/v1")
    finally:
        process.kill()
        process.wait()
        if rest.ident is not None:
            rest.join()
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.close()
