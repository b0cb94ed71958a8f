"""The sandbox, with real processes: deadlines, limits, walls, and nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longforge.errors import InputError, LongforgeError
from longforge.forge.code_search.sandbox import Sandbox, ServerLimits

HOSTILE = """
    import ctypes, os, socket, subprocess, sys, time, urllib.request
    from longforge.forge.code_search import isolation
    from longforge.forge.code_search.tool_server import main
    {weakened}

    def connect(): socket.create_connection(("127.0.0.1", {port}), timeout=2); return "connected"
    def fetch(): return urllib.request.urlopen("http://127.0.0.1:{port}").read().decode()
    def bind(): s = socket.socket(socket.AF_UNIX); s.bind("x"); return "bound"
    def write(): open("{folder}/written", "w"); return "written"
    def low_write(): os.open("{folder}/written", os.O_WRONLY | os.O_CREAT); return "written"
    def read_file(): return open("/etc/passwd").read()
    def listing(): return str(os.listdir("/"))
    def remove(): os.remove("{folder}/precious"); return "removed"
    def run(): return subprocess.run(["id"], capture_output=True).stdout.decode()
    def shell(): os.system("touch {folder}/written"); return "ran"
    def program(): os.execv("/bin/sh", ["sh", "-c", "touch {folder}/written"])
    def library(): ctypes.CDLL("libc.so.6"); return "loaded"
    def fork(): os.fork(); return "forked"
    def kill(): os.kill(os.getppid(), 9); return "killed"
    def sleep(): time.sleep(60)
    def spin():
        while True: pass
    def flood(): return "x" * 10_000_000
    def memory(): return str(len(bytearray(2 * 2**30)))
    def crash(): os.abort()
    def linger(): os.close(0); time.sleep(60)

    deeds = [f for f in list(globals().values()) if getattr(f, "__module__", "") == "__main__"]
    sys.exit(main({{deed.__name__: deed for deed in deeds}}))
"""
REFUSED = [
    "connect",
    "fetch",
    "bind",
    "write",
    "low_write",
    "read_file",
    "listing",
    "remove",
    "run",
    "shell",
    "program",
    "library",
    "fork",
    "kill",
]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A folder and a listening port that no tool may reach."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "precious").write_text("keep me")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield folder, listener.getsockname()[1]


def start_hostile(zoo: Path, outside: tuple[Path, int], weakened: str) -> Sandbox:
    """A tool server whose tools try everything that tools must not; `weakened` may pull down some walls."""
    folder, port = outside
    program = folder / "hostile.py"
    program.write_text(textwrap.dedent(HOSTILE).format(folder=folder, port=port, weakened=weakened))
    limits = ServerLimits(deadline_s=0.4, max_output=500)
    return Sandbox(zoo, limits=limits, program=[str(program)])


@pytest.fixture(scope="module")
def hostile(zoo: Path, outside: tuple[Path, int]) -> Iterator[Sandbox]:
    with start_hostile(zoo, outside, "") as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def hostile_without_kernel(zoo: Path, outside: tuple[Path, int]) -> Iterator[Sandbox]:
    """As where user namespaces are forbidden: the audit hook stands alone."""
    weakened = "isolation._succeeds = isolation._change_root = lambda *_: False"
    with start_hostile(zoo, outside, weakened) as sandbox:
        assert sandbox.isolation == {
            "network": False,
            "root": False,
            "capabilities": False,
            "audit_hook": True,
        }
        yield sandbox


@pytest.fixture(scope="module")
def hostile_without_hook(zoo: Path, outside: tuple[Path, int]) -> Iterator[Sandbox]:
    """As if native code had got round Python: the kernel's walls stand alone."""
    with start_hostile(zoo, outside, "isolation._refuse = lambda *_: None") as sandbox:
        if not (sandbox.isolation["network"] and sandbox.isolation["root"]):
            pytest.skip("this machine forbids user namespaces")
        yield sandbox


def test_tools_answer_and_refuse(hostile: Sandbox) -> None:
    assert hostile.call("grep", {"pattern": r"class Dog\b"}) == (
        True,
        "animals/dogs.py:4: class Dog(base.Animal):",
    )
    assert hostile.call("read", {"path": "../secret", "start": 1})[0] is False
    assert hostile.call("grep", {"pattern": "("})[1].startswith("error: bad pattern")


def test_the_walls_are_reported(hostile: Sandbox) -> None:
    assert set(hostile.isolation) == {"network", "root", "capabilities", "audit_hook"}
    assert hostile.isolation["audit_hook"]


def assert_nothing_happened(sandbox: Sandbox, outside: tuple[Path, int], deed: str) -> None:
    ok, text = sandbox.call(deed, {})
    assert not ok and text.startswith("error: ")
    assert not (outside[0] / "written").exists() and (outside[0] / "precious").exists()
    assert sandbox.call("grep", {"pattern": f"still alive after {deed}"}) == (True, "no match")


@pytest.mark.parametrize("deed", REFUSED)
def test_a_hostile_call_gets_nowhere(hostile: Sandbox, outside: tuple[Path, int], deed: str) -> None:
    assert_nothing_happened(hostile, outside, deed)


@pytest.mark.parametrize("deed", REFUSED)
def test_the_hook_alone_stops_python(
    hostile_without_kernel: Sandbox, outside: tuple[Path, int], deed: str
) -> None:
    assert_nothing_happened(hostile_without_kernel, outside, deed)


@pytest.mark.parametrize(
    "deed", [deed for deed in REFUSED if deed not in ("shell", "library", "fork", "kill")]
)
def test_the_kernel_alone_keeps_network_files_and_programs_away(
    hostile_without_hook: Sandbox, outside: tuple[Path, int], deed: str
) -> None:
    if deed == "listing":
        assert hostile_without_hook.call(deed, {}) == (True, "[]")
    else:
        assert_nothing_happened(hostile_without_hook, outside, deed)


@pytest.mark.parametrize("deed", ["sleep", "spin"])
def test_a_call_is_killed_at_its_deadline(hostile: Sandbox, deed: str) -> None:
    started = time.monotonic()
    assert hostile.call(deed, {}) == (False, "error: stopped after 0.4 seconds")
    assert time.monotonic() - started < 5
    assert _children(hostile.pid) == []


def test_a_catastrophic_expression_is_stopped_and_the_agent_told(hostile: Sandbox) -> None:
    assert hostile.call("grep", {"pattern": r"(.+)+[!?]"}) == (
        False,
        "error: stopped after 0.4 seconds",
    )


def test_output_is_cut(hostile: Sandbox) -> None:
    ok, text = hostile.call("flood", {})
    assert ok and text == "x" * 500 + "\n... cut"


def test_memory_is_bounded(hostile: Sandbox) -> None:
    assert hostile.call("memory", {}) == (False, "error: memory needs too much memory")


@pytest.mark.parametrize("deed", ["crash", "linger"])
def test_a_call_that_dies_or_hides_is_reported_and_reaped(hostile: Sandbox, deed: str) -> None:
    assert hostile.call(deed, {}) == (False, "error: the tool failed")
    assert _children(hostile.pid) == []


@pytest.mark.parametrize(
    "request_", [b"nonsense\n", b"[]\n", b'{"tool": 1, "arguments": {}}\n', b"[" * 9999 + b"\n"]
)
def test_a_malformed_request_is_answered(hostile: Sandbox, request_: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(hostile.socket)
        connection.sendall(request_)
        assert json.loads(connection.makefile().readline())["ok"] is False


def test_many_calls_at_once_are_each_answered(hostile: Sandbox) -> None:
    connections = []
    for number in range(30):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(hostile.socket)
        body = {"tool": "read", "arguments": {"path": "animals/dogs.py", "start": 4 + number % 2}}
        connection.sendall(json.dumps(body).encode() + b"\n")
        connections.append(connection)
    for number, connection in enumerate(connections):
        with connection, connection.makefile() as stream:
            result = json.loads(stream.readline())["result"]
            assert result.startswith(("class Dog", "    def bark")[number % 2])


def test_closing_leaves_no_process_and_no_folder(zoo: Path) -> None:
    sandbox = Sandbox(zoo)
    folder, pid = sandbox.folder, sandbox.pid
    sandbox.close()
    sandbox.close()
    assert not folder.exists() and not _alive(pid)


def test_a_server_that_was_killed_is_told_in_one_line(zoo: Path) -> None:
    with Sandbox(zoo) as sandbox:
        sandbox.check()
        os.kill(sandbox.pid, signal.SIGKILL)
        sandbox._process.wait()
        with pytest.raises(LongforgeError, match="tool server: it ended with code -9"):
            sandbox.check()


def test_the_server_ends_when_its_owner_is_killed(zoo: Path) -> None:
    program = f"""
import sys, time
from longforge.forge.code_search.sandbox import Sandbox
sandbox = Sandbox({str(zoo)!r})
print(sandbox.pid, sandbox.folder, flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, folder = owner.stdout.readline().split()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 10
    while _alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(int(pid))
    for left in ("socket", "root"):
        path = Path(folder) / left
        path.rmdir() if path.is_dir() else path.unlink()
    Path(folder).rmdir()


def test_a_tree_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tree: expected a folder"):
        Sandbox(tmp_path / "missing")
    with pytest.raises(InputError, match="tree: expected Python files"):
        Sandbox(tmp_path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
