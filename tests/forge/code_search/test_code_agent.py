"""The agent is a process that knows an endpoint; the host runs many and leaves none behind."""

import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_host_client import AgentHost
from longforge.errors import InputError
from longforge.forge.code_search.agent_host import Host, _Agent
from longforge.forge.code_search.prompts import SYSTEM_PROMPT
from longforge.forge.code_search.sandbox import Sandbox

QUESTION = "Which file defines class Dog?"


@pytest.fixture(scope="module")
def sandbox(zoo: Path) -> Iterator[Sandbox]:
    with Sandbox(zoo) as running:
        yield running


@pytest.fixture(scope="module")
def host() -> Iterator[AgentHost]:
    with AgentHost() as running:
        yield running


def tool_call(name: str, arguments: str, call_id: str = "call_1") -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def search_then_answer(messages: list[dict]) -> dict:
    """Greps for the class, then answers with the path that the tool showed."""
    last = messages[-1]
    if last["role"] == "tool":
        return {"content": last["content"].split(":")[0], "reasoning_content": "answer"}
    call = tool_call("grep", json.dumps({"pattern": r"class Dog\b"}))
    return {"reasoning_content": "find class", "reasoning_details": [{"text": "x"}], "tool_calls": [call]}


def run(host: AgentHost, episode: str, url: str, sandbox: Sandbox, deadline_s: float = 20.0, **task) -> dict:
    fields = {"question": QUESTION, "tools_socket": sandbox.socket, **task}
    future = host.submit(episode, base_url=url, api_key=f"key-{episode}", task=fields, deadline_s=deadline_s)
    return future.result(timeout=30)


def test_an_episode_calls_tools_and_answers(host, sandbox, chat_server) -> None:
    server = chat_server(search_then_answer)
    result = run(host, "one", server.url, sandbox, max_tokens=77, temperature=0.5)
    assert (result["outcome"], result["answer"], result["error"]) == ("answered", "animals/dogs.py", None)
    assert [m["role"] for m in result["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert result["messages"][0]["content"] == SYSTEM_PROMPT
    assert server.keys == ["key-one"] * 2
    first, second = server.requests
    assert (first["max_tokens"], first["temperature"]) == (77, 0.5)
    assert [tool["function"]["name"] for tool in first["tools"]] == ["grep", "read"]
    assert second["messages"][2] == {
        "role": "assistant",
        "content": "",
        **search_then_answer([{"role": "user"}]),
    }


def test_the_program_alone_does_the_same(sandbox, chat_server) -> None:
    server = chat_server(search_then_answer)
    environment = {**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "alone"}
    done = subprocess.run(
        [sys.executable, "-m", "longforge.forge.code_search.agent"],
        input=json.dumps({"question": QUESTION, "tools_socket": sandbox.socket}),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answer"] == "animals/dogs.py"
    assert server.keys == ["alone"] * 2


@pytest.mark.parametrize(
    ("task", "missing", "says"),
    [
        ("{}", None, "missing question, tools_socket"),
        ('{"question": "?", "tools_socket": "s", "colour": 1}', None, "unknown colour"),
        ("nonsense", None, "Expecting value"),
        (
            '{"question": "?", "tools_socket": "s"}',
            "OPENAI_API_KEY",
            "OPENAI_API_KEY: expected in the environment",
        ),
    ],
)
def test_the_program_refuses_in_one_line(monkeypatch, capsys, task, missing, says) -> None:
    from longforge.forge.code_search import agent

    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "" if name == missing else "http://127.0.0.1:1")
    assert agent.main([task]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_an_agent_that_never_answers_gives_up_after_its_turns(host, sandbox, chat_server) -> None:
    server = chat_server(lambda messages: {"tool_calls": [tool_call("grep", '{"pattern": "x"}')]})
    result = run(host, "endless", server.url, sandbox, max_turns=3)
    assert (result["outcome"], result["answer"]) == ("gave_up", None)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("grep", "{broken", "error: arguments are not JSON"),
        ("grep", "[1]", "error: arguments are not named"),
        ("read", '{"path": "../x", "start": 1}', "outside the tree"),
        ("rm", "{}", "error: no tool 'rm'"),
    ],
)
def test_a_bad_tool_call_becomes_a_result_that_the_model_can_read(
    host, sandbox, chat_server, name, arguments, told
) -> None:
    def script(messages: list[dict]) -> dict:
        last = messages[-1]
        return (
            {"content": last["content"]}
            if last["role"] == "tool"
            else {"tool_calls": [tool_call(name, arguments)]}
        )

    result = run(host, f"bad-{name}-{len(arguments)}", chat_server(script).url, sandbox)
    assert result["outcome"] == "answered" and told in result["answer"]


def test_parallel_calls_are_all_answered(host, sandbox, chat_server) -> None:
    calls = [tool_call("grep", json.dumps({"pattern": f"class {name}"}), name) for name in ("Dog", "Animal")]

    def script(messages: list[dict]) -> dict:
        return {"content": "done"} if messages[-1]["role"] == "tool" else {"tool_calls": calls}

    result = run(host, "parallel", chat_server(script).url, sandbox)
    answers = {m["tool_call_id"]: m["content"] for m in result["messages"] if m["role"] == "tool"}
    assert answers["Dog"].startswith("animals/dogs.py") and answers["Animal"].startswith("animals/base.py")


def test_an_unreachable_or_failing_endpoint_fails_the_episode_with_a_reason(
    host, sandbox, chat_server
) -> None:
    gone = run(host, "gone", "http://127.0.0.1:9", sandbox)
    assert gone["outcome"] == "failed" and "APIConnectionError" in gone["error"]
    refused = run(host, "500", chat_server(lambda messages: {"status": 500}).url, sandbox)
    assert refused["outcome"] == "failed" and "InternalServerError" in refused["error"]
    wrong = host.submit("wrong", base_url="http://127.0.0.1:9", api_key="k", task={}, deadline_s=5).result(30)
    assert wrong["outcome"] == "failed" and "missing question" in wrong["error"]


def test_many_episodes_at_once_keep_their_own_keys_and_answers(host, sandbox, chat_server) -> None:
    server = chat_server(lambda messages: {"content": messages[1]["content"][::-1]})
    futures = {
        f"e{i}": host.submit(
            f"e{i}",
            base_url=server.url,
            api_key=f"k{i}",
            task={"question": f"question {i} " + "x" * 5000, "tools_socket": sandbox.socket},
        )
        for i in range(40)
    }
    for i, future in enumerate(futures.values()):
        assert future.result(30)["answer"] == (f"question {i} " + "x" * 5000)[::-1]
    assert sorted(server.keys) == sorted(f"k{i}" for i in range(40))


def test_a_silent_endpoint_meets_the_deadline_and_a_dead_agent_is_a_failure(
    host, sandbox, chat_server
) -> None:
    silent = chat_server(lambda messages: time.sleep(3) or {"content": "late"})
    assert run(host, "late", silent.url, sandbox, deadline_s=0.3)["outcome"] == "deadline"
    future = host.submit(
        "killed", base_url=silent.url, api_key="k", task={"question": "?", "tools_socket": sandbox.socket}
    )
    while not (agents := _children(host.pid)):
        time.sleep(0.01)
    os.kill(agents[0], signal.SIGKILL)
    assert future.result(30)["outcome"] == "failed"
    assert _children(host.pid) == []


def test_an_episode_can_be_cancelled_and_its_id_not_be_used_twice(host, sandbox, chat_server) -> None:
    silent = chat_server(lambda messages: time.sleep(3) or {"content": "late"})
    task = {"question": "?", "tools_socket": sandbox.socket}
    future = host.submit("twice", base_url=silent.url, api_key="k", task=task)
    with pytest.raises(InputError, match="'twice': already running"):
        host.submit("twice", base_url=silent.url, api_key="k", task=task)
    host.cancel("twice")
    assert future.result(30)["outcome"] == "cancelled"


def test_a_cancel_that_comes_with_the_result_does_not_end_the_host() -> None:
    (tasks, to_host), (from_host, results), (pipe, to_pipe) = os.pipe(), os.pipe(), os.pipe()

    class TasksFirst(selectors.DefaultSelector):
        def select(self, timeout: float | None = None):
            return sorted(super().select(timeout), key=lambda ready: ready[0].fd != tasks)

    host = Host(tasks, results)
    host._selector = TasksFirst()
    with subprocess.Popen(["sleep", "60"]) as child:
        host._agents[pipe] = _Agent("e", child.pid, pipe, time.monotonic() + 60)
        host._selector.register(pipe, selectors.EVENT_READ)
        os.write(to_pipe, b'{"answer": "x", "outcome": "answered"}')
        os.write(to_host, b'{"cancel": "e"}\n')
        os.close(to_host)
        host.run()
    gc.unfreeze()
    assert json.loads(os.read(from_host, 65536)) == {"id": "e", "answer": "x", "outcome": "answered"}
    for descriptor in (tasks, from_host, results, to_pipe):
        os.close(descriptor)


def test_closing_the_host_kills_its_agents(sandbox, chat_server) -> None:
    silent = chat_server(lambda messages: time.sleep(3) or {"content": "late"})
    host = AgentHost()
    task = {"question": "?", "tools_socket": sandbox.socket}
    future = host.submit("running", base_url=silent.url, api_key="k", task=task)
    while not (agents := _children(host.pid)):
        time.sleep(0.01)
    host.close()
    assert future.cancelled() and not any(Path(f"/proc/{pid}").exists() for pid in agents)


def test_an_agent_dies_with_its_host(sandbox, chat_server) -> None:
    silent = chat_server(lambda messages: time.sleep(5) or {"content": "late"})
    with AgentHost() as host:
        task = {"question": "?", "tools_socket": sandbox.socket}
        future = host.submit("orphan", base_url=silent.url, api_key="k", task=task)
        while not (agents := _children(host.pid)):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(host.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(_runs(pid) for pid in agents):
            time.sleep(0.02)
        assert not any(_runs(pid) for pid in agents)
        while not future.done():
            time.sleep(0.01)
        assert future.cancelled()


def test_the_agent_loads_no_torch() -> None:
    program = "import sys, longforge.forge.code_search.agent_host; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
