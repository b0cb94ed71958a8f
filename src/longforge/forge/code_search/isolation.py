"""Walls around a process that runs tools: no network, no files, no other programs.

Each wall is tried and what stands is reported, so that a run can record it:

| wall           | what it does                                                    | needs           |
|----------------|-----------------------------------------------------------------|-----------------|
| `network`      | a network namespace of its own, without an interface            | user namespaces |
| `root`         | an empty folder becomes the file system                         | user namespaces |
| `capabilities` | all of them dropped, none to be gained by running a program     | Linux           |
| `audit_hook`   | Python refuses sockets, files, programs, native libraries       | nothing         |

The hook alone stops Python code, not native code; the first three are the kernel's.
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

__all__ = ["build_walls", "die_with_parent", "limit_child"]

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION_3 = 0x20080522

REFUSED_EVENTS = (
    "ctypes.",
    "ftplib.",
    "http.",
    "open",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.link",
    "os.listdir",
    "os.mkdir",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "os.spawn",
    "os.startfile",
    "os.symlink",
    "os.system",
    "os.truncate",
    "os.utime",
    "pty.spawn",
    "shutil.",
    "smtplib.",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostby",
    "socket.sendmsg",
    "socket.sendto",
    "subprocess.Popen",
    "tempfile.",
    "urllib.",
)
"""Beginnings of the names of audit events that nothing needs once the tree is in memory."""
REFUSED_IN_CHILDREN = ("os.fork", "os.kill", "os.killpg", "signal.", "socket.__new__")

_in_child = False


def build_walls(empty_folder: Path) -> dict[str, bool]:
    """Shut this process in for good and say which walls stand. Call it with one thread, all imports done."""
    libc = _libc()
    own_namespaces = _succeeds(libc, "unshare", CLONE_NEWUSER | CLONE_NEWNET)
    root_is_empty = _change_root(empty_folder)
    report = {
        "network": own_namespaces,
        "root": root_is_empty,
        "capabilities": _drop_capabilities(libc),
        "audit_hook": True,
    }
    sys.addaudithook(_refuse)
    return report


def limit_child(cpu_seconds: int, memory_bytes: int) -> None:
    """Limits of one forked call, which may not fork again; `memory_bytes` bounds its whole address space."""
    global _in_child
    for kind, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 8),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (wanted, wanted))
    _in_child = True


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that happens. Linux only."""
    libc = _libc()
    if libc is not None and hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    refused = event.startswith(REFUSED_EVENTS) or (_in_child and event.startswith(REFUSED_IN_CHILDREN))
    if refused:
        raise PermissionError(f"{event} is refused in the sandbox")


_loaded: list[ctypes.CDLL | None] = []


def _libc() -> ctypes.CDLL | None:
    """The C library, with its functions looked up at once: later the hook refuses even to look."""
    if not _loaded:
        try:
            library = ctypes.CDLL(None, use_errno=True)
        except OSError:
            _loaded.append(None)
        else:
            for name in ("unshare", "prctl", "capset"):
                getattr(library, name, None)
            _loaded.append(library)
    return _loaded[0]


def _succeeds(libc: ctypes.CDLL | None, name: str, *arguments: Any) -> bool:
    return libc is not None and hasattr(libc, name) and getattr(libc, name)(*arguments) == 0


def _change_root(empty_folder: Path) -> bool:
    try:
        os.chdir(empty_folder)
        os.chroot(".")
    except (OSError, AttributeError):
        return False
    return True


def _drop_capabilities(libc: ctypes.CDLL | None) -> bool:
    """No new privileges by running a program, and an empty effective, permitted and inheritable set."""
    if not _succeeds(libc, "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    return _succeeds(libc, "capset", header, sets)
