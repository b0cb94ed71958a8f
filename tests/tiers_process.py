"""Another process that uses a folder of pages: `python tiers_process.py <what> <folder> <numbers>`."""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from longforge.engine.tiers import FileTier, RecordFormat
from small_tiers import name_of, small_format, small_pool

CAPACITY = 1 << 30
WIDE = 40_000
"""Width of a pool whose record is over a megabyte, so that writing it takes a while."""


def write(folder: Path, count: int) -> None:
    """Writes pages 0 .. count-1, each a page of the small pool."""
    form = small_format()
    tier = FileTier(folder, CAPACITY, form.record_bytes)
    for i in range(count):
        assert tier.put(name_of(i), form.pack(i % form.pages, name_of(i)))
    tier.close()
    print(tier.stored, tier.failures)


def together(folder: Path, writers: int, rounds: int) -> None:
    """Several processes write the same keys, beginning each at the same moment."""
    form = small_format()
    gates = [os.pipe() for _ in range(writers)]
    children = []
    for gate in gates:
        child = os.fork()
        if not child:
            tier = FileTier(folder, CAPACITY, form.record_bytes)
            for i in range(rounds):
                os.read(gate[0], 1)
                tier.put(name_of(i), form.pack(i % form.pages, name_of(i)))
            tier.close()
            os._exit(tier.failures)
        children.append(child)
    for _ in range(rounds):
        for gate in gates:
            os.write(gate[1], b"x")
    print(sum(os.waitpid(child, 0)[1] for child in children))


def killed(folder: Path, times: int, seed: int) -> None:
    """Writers that are killed, some while they are busy, some exactly between two pieces of a record."""
    draws = random.Random(seed)
    form = RecordFormat(small_pool(width=WIDE))
    for round_number in range(times):
        ready, started = os.pipe()
        child = os.fork()
        if not child:
            if round_number % 2:
                _die_in_write(draws.randrange(form.record_bytes))
            _write_forever(folder, form, round_number, started)
        os.close(started)
        os.read(ready, 1)
        time.sleep(draws.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
    print(times)


def _write_forever(folder: Path, form: RecordFormat, round_number: int, started: int) -> None:
    tier = FileTier(folder, CAPACITY, form.record_bytes)
    os.write(started, b"x")
    for i in range(1_000):
        name = name_of(f"{round_number}-{i % 20}")
        tier.put(name, form.pack(i % form.pages, name))
        tier.flush(10)
    os._exit(0)


def _die_in_write(after: int) -> None:
    plain, left = os.write, [after]

    def short(descriptor: int, data: bytes) -> int:
        if len(data) > 1:
            if left[0] < len(data):
                plain(descriptor, memoryview(data)[: left[0]])
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= len(data)
        return plain(descriptor, data)

    os.write = short


def limited(folder: Path, count: int) -> None:
    """Writes pages where no file may grow beyond half a record, as on a full disk."""
    form = small_format()
    tier = FileTier(folder, CAPACITY, form.record_bytes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (form.record_bytes // 2, form.record_bytes // 2))
    for i in range(count):
        tier.put(name_of(i), form.pack(0, name_of(i)))
        tier.flush()
    tier.close()
    print(f"{tier.stored}|{tier.failures}|{tier.dropped}|{tier.reason}")


if __name__ == "__main__":
    verb = {"write": write, "together": together, "killed": killed, "limited": limited}[sys.argv[1]]
    verb(Path(sys.argv[2]), *map(int, sys.argv[3:]))
