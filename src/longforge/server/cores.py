"""How many CPU cores are really free for this process.

Threads of one kernel wait for each other at its end. One thread more than there are free cores makes every
kernel wait for a thread that does not run, which is slower than one thread fewer. So the number of threads is
what remains after the affinity mask, the quota of the control groups, and what others are computing now.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cores", "busy_cores", "free_cores", "quota_cores"]

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Cores:
    """What limits this process to `free` cores, at least 1."""

    machine: int
    """Cores of the machine."""
    allowed: int
    """Of these, in the affinity mask."""
    quota: float | None
    """Cores' worth of time that the control groups grant; None without a limit."""
    busy: float
    """Cores' worth of time that the machine's processes take now."""

    @property
    def free(self) -> int:
        """Cores to compute on."""
        limits = [self.allowed, round(self.machine - self.busy)]
        if self.quota is not None:
            limits.append(int(self.quota))
        return max(1, min(limits))

    @property
    def why(self) -> str:
        """The number in words."""
        said = f"{self.free} of {self.machine} {'core' if self.machine == 1 else 'cores'}"
        reasons = []
        if self.allowed < self.machine:
            reasons.append(f"this process may use {self.allowed}")
        if self.quota is not None:
            reasons.append(f"its quota is {self.quota:.3g}")
        if self.busy >= 0.5:
            reasons.append(f"{self.busy:.1f} are busy")
        return f"{said} ({', '.join(reasons)})" if reasons else f"{said}, all free"


def free_cores(cgroups: Path = CGROUPS, proc: Path = PROC, look_seconds: float = LOOK_SECONDS) -> Cores:
    """Looks at this machine for `look_seconds`. What cannot be read, as on a system without /proc, is no
    limit."""
    machine = os.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)
    before = _read(proc / "stat")
    time.sleep(look_seconds)
    return Cores(
        machine=machine,
        allowed=machine if affinity is None else len(affinity(0)),
        quota=quota_cores(cgroups, _read(proc / "self" / "cgroup")),
        busy=busy_cores(before, _read(proc / "stat")) * machine,
    )


def quota_cores(cgroups: Path, membership: str) -> float | None:
    """Cores' worth of time that the control groups of a process grant, the tightest of them all.

    cgroups: where they are mounted. membership: the text of /proc/PID/cgroup, lines id:controllers:path;
    version 2 has id 0 and no controllers. A path is looked at with all its parents: a limit of any counts.
    """
    found = []
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found += [_version_2(folder) for folder in _with_parents(cgroups, path)]
        elif "cpu" in controllers.split(","):
            for mount in (cgroups / controllers, cgroups / "cpu"):
                found += [_version_1(folder) for folder in _with_parents(mount, path)]
    limits = [quota for quota in found if quota is not None]
    return min(limits) if limits else None


def busy_cores(before: str, after: str) -> float:
    """The share of all cores that was computing between two texts of /proc/stat, 0 to 1."""
    start, end = _cpu_times(before), _cpu_times(after)
    if start is None or end is None:
        return 0.0
    spent = [b - a for a, b in zip(start, end, strict=False)]
    total = sum(spent)
    idle = spent[3] + (spent[4] if len(spent) > 4 else 0)  # idle, and waiting for a disk
    return 1 - idle / total if total > 0 else 0.0


def _cpu_times(stat: str) -> list[int] | None:
    """Ticks of all cores: user, nice, system, idle, iowait, irq, softirq, steal."""
    fields = stat.partition("\n")[0].split()
    if len(fields) < 5 or fields[0] != "cpu":
        return None
    return [int(field) for field in fields[1:9]]  # guests' time is within user's


def _with_parents(mount: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part and part != ".."]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _version_2(folder: Path) -> float | None:
    """`cpu.max`: "QUOTA PERIOD" in microseconds, or "max PERIOD"."""
    fields = _read(folder / "cpu.max").split()
    if len(fields) != 2 or fields[0] == "max":
        return None
    return int(fields[0]) / int(fields[1])


def _version_1(folder: Path) -> float | None:
    """Microseconds per period, -1 without a limit."""
    quota = _read(folder / "cpu.cfs_quota_us").strip()
    period = _read(folder / "cpu.cfs_period_us").strip()
    if not quota or not period or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
