"""Rollout: every episode ends, a late or broken one with reward 0, and none holds up its group."""

import asyncio
import queue
import sys
import time

import httpx
import pytest

from longforge.chat import train_tokenizer
from longforge.errors import LongforgeError, RunError
from longforge.forge import agents as agents_module
from longforge.forge.agents import AgentProgram, HostedAgents
from longforge.forge.background import BackgroundLoop, HttpServer
from longforge.forge.engine_client import EngineClient, EngineGone
from longforge.forge.gateway import Gateway, Policy
from longforge.forge.memory_pool import MemoryPool
from longforge.forge.rollout import Rollouts
from longforge.protocol import Episode, Group

AGENT = """
import json, os, sys, time, urllib.request
task = json.loads(sys.stdin.readline())
if task["do"] == "crash": raise SystemExit(3)
if task["do"] == "babble": print("no json"); raise SystemExit
if task["do"] == "sleep": time.sleep(60)
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    json.dumps({"model": "m", "messages": [{"role": "user", "content": task["do"]}]}).encode(),
    {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"},
)
message = json.load(urllib.request.urlopen(request))["choices"][0]["message"]
print("some talk")
print(json.dumps({"answer": None if task["do"] == "give up" else message["content"]}))
"""

HOST = """
import json, sys
for line in sys.stdin:
    body = json.loads(line)
    if body.get("task", {}).get("do") == "die": sys.exit(1)
    if "cancel" in body: open(sys.argv[1], "a").write(body["cancel"] + "\\n")
    elif body["task"]["do"] != "sleep":
        print(json.dumps({"id": body["id"], "answer": body["api_key"], "outcome": "answered", "error":
        None}), flush=True)
"""


class Words:
    """An environment whose right answer is "yes"."""

    def shown(self, task):
        return {"do": task["do"]}

    def __init__(self):
        self.broken = None

    def check(self):
        if self.broken:
            raise self.broken

    def score(self, task, answer):
        return 1.0 if answer == "yes" else 0.0


class YesEngine:
    """Samples "yes" and the end of turn, whatever it is asked."""

    def __init__(self, tokenizer):
        self.ids = tokenizer.encode("yes[e~[")

    def __call__(self, request: httpx.Request) -> httpx.Response:
        n = len(self.ids)
        choice = {"token_ids": self.ids, "logprobs": {"token_logprobs": [-1.0] * n}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [{**choice, "weight_versions": [0] * n}]})


@pytest.fixture
def bench(tmp_path):
    """A running loop with a gateway, and a function that plays one group on it."""
    tokenizer = train_tokenizer(["yes no give up"] * 3, 300)
    pool, ends = MemoryPool(), queue.Queue()
    with BackgroundLoop() as loop:
        transport = httpx.MockTransport(YesEngine(tokenizer))
        engine = EngineClient("http://engine", "m", transport=transport)
        gateway = Gateway(
            tokenizer=tokenizer, engine=engine, pool=pool, family="m3", context=300, model_name="m", seed=0
        )
        server = HttpServer(gateway.app, loop)

        def rollouts(agents, **changes):
            settings = {"deadline": 20.0, "concurrency": 4} | changes
            return Rollouts(
                loop=loop,
                gateway=gateway,
                gateway_url=server.url,
                agents=agents,
                environment=Words(),
                pool=pool,
                ended=ends.put,
                **settings,
            )

        yield pool, ends, rollouts
        server.close()


def group_of(*tasks: str) -> Group:
    return Group("g", 0, tuple(Episode(f"g/{i}", "g", {"do": task}) for i, task in enumerate(tasks)))


def test_every_episode_ends_and_only_a_right_answer_is_rewarded(bench, tmp_path):
    pool, ends, rollouts = bench
    agents = AgentProgram([sys.executable, "-c", AGENT], tmp_path / "agent.log")
    tasks = ("hello", "crash", "babble", "give up", "sleep")
    play = rollouts(agents, deadline=8.0)
    play.submit(group_of(*tasks), phase="train", step=4, policy=Policy(max_tokens=9))
    found = [ends.get(timeout=20) for _ in tasks]
    assert [end.group_completed for end in found] == [False] * 4 + [True]
    episodes = pool.group("g").episodes
    assert [e.outcome for e in episodes] == ["answered", "failed", "failed", "gave_up", "deadline"]
    assert [e.reward for e in episodes] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert [len(e.calls) for e in episodes] == [1, 0, 0, 1, 0]
    assert episodes[0].record["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"},
    ]
    assert "code 3" in episodes[1].record["detail"] and "not back after 8 s" in episodes[4].record["detail"]
    assert pool.groups("train")[0].status == "completed"
    play.check()


def test_no_more_than_the_allowed_number_run_at_once(bench):
    _pool, ends, rollouts = bench
    running, most = [0], [0]

    class Slow:
        async def run(self, task, base_url, key):
            running[0] += 1
            most[0] = max(most[0], running[0])
            await asyncio.sleep(0.02)
            running[0] -= 1
            raise TimeoutError

    play = rollouts(Slow(), concurrency=3)
    play.submit(group_of(*["x"] * 10), phase="train", step=0, policy=Policy(max_tokens=9))
    for _ in range(10):
        ends.get(timeout=10)
    assert most[0] == 3


def test_a_host_serves_many_and_is_told_about_deadlines(bench, tmp_path):
    _pool, ends, rollouts = bench
    cancelled = tmp_path / "cancelled"
    agents = HostedAgents([sys.executable, "-c", HOST, str(cancelled)], tmp_path / "log", deadline=4.0)
    play = rollouts(agents, deadline=4.0)
    play._loop.run(agents.start())
    play.submit(group_of("a", "b", "sleep"), phase="train", step=0, policy=Policy(max_tokens=9))
    outcomes = {e.episode.task["do"]: e.episode for e in (ends.get(timeout=10) for _ in range(3))}
    assert [outcomes[name].outcome for name in ("a", "b", "sleep")] == ["answered", "answered", "deadline"]
    keys = {outcomes[name].record["answer"] for name in ("a", "b")}
    assert len(keys) == 2 and all(key.startswith("lf-") for key in keys), "a key of its own for each"
    for _ in range(100):
        if cancelled.exists() and cancelled.read_text():
            break
        time.sleep(0.02)
    assert cancelled.read_text().startswith("lf-")
    play._loop.run(agents.close())


def test_a_host_that_dies_breaks_the_run_and_not_the_rewards(bench, tmp_path):
    pool, ends, rollouts = bench
    agents = HostedAgents([sys.executable, "-c", HOST, "-"], tmp_path / "log", deadline=5.0)
    play = rollouts(agents)
    play._loop.run(agents.start())
    play.submit(group_of("sleep", "die"), phase="train", step=0, policy=Policy(max_tokens=9))
    for _ in range(200):
        if play.failure:
            break
        time.sleep(0.02)
    with pytest.raises(RunError, match="agent host: it"):
        play.check()
    assert ends.empty() and len(pool.unfinished("train")) == 2
    play._loop.run(agents.close())


@pytest.mark.parametrize("gone", ["engine", "tools"])
def test_an_engine_or_tools_that_are_gone_break_the_run_and_not_the_rewards(bench, tmp_path, gone):
    pool, ends, rollouts = bench
    play = rollouts(AgentProgram([sys.executable, "-c", AGENT], tmp_path / "agent.log"))

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    if gone == "engine":
        play._gateway._engine = EngineClient("http://engine", "m", transport=httpx.MockTransport(refuse))
    else:
        play._environment.broken = LongforgeError("tool server: it ended")
    play.submit(group_of("hello", "hello"), phase="train", step=0, policy=Policy(max_tokens=9))
    for _ in range(1000):
        if play.failure and not play._tasks:
            break
        time.sleep(0.02)
    with pytest.raises(EngineGone if gone == "engine" else LongforgeError, match=r"^(engine|tool server): "):
        play.check()
    assert ends.empty() and len(pool.unfinished("train")) == 2


def test_an_agent_that_never_stops_talking_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(agents_module, "OUTPUT_LIMIT", 10_000)
    program = "while True: print('talk ' * 100, flush=True)"
    agents = AgentProgram([sys.executable, "-c", program], tmp_path / "log")
    reply = asyncio.run(asyncio.wait_for(agents.run({}, "http://nowhere", "key"), 60))
    assert (reply.outcome, reply.detail) == ("failed", "agent: more than 10000 bytes of output")


def test_a_host_that_writes_nonsense_is_one_line_and_not_a_wait(tmp_path):
    program = "import sys; sys.stdin.readline(); print('no result', flush=True); sys.stdin.read()"

    async def play() -> None:
        agents = HostedAgents([sys.executable, "-c", program], tmp_path / "log", deadline=60.0)
        await agents.start()
        try:
            await asyncio.wait_for(agents.run({}, "http://nowhere", "key"), 60)
        finally:
            await agents.close()

    with pytest.raises(RunError, match="agent host: it wrote what is no result"):
        asyncio.run(play())


def test_cancelled_episodes_stay_unfinished_and_run_again(bench, tmp_path):
    pool, ends, rollouts = bench
    agents = AgentProgram([sys.executable, "-c", AGENT], tmp_path / "agent.log")
    play = rollouts(agents, concurrency=1)
    play.submit(group_of("sleep", "hello"), phase="train", step=0, policy=Policy(max_tokens=9))
    time.sleep(0.3)
    play.cancel()
    assert [e.episode_id for e in pool.unfinished("train")] == ["g/0", "g/1"]
    play.enqueue(pool.unfinished("train")[1], phase="train", policy=Policy(max_tokens=9))
    assert ends.get(timeout=10).episode.reward == 1.0


def test_a_program_that_does_not_exist_is_one_line(bench, tmp_path):
    _pool, _ends, rollouts = bench
    play = rollouts(AgentProgram(["/no/such/agent"], tmp_path / "log"))
    play.submit(group_of("x"), phase="train", step=0, policy=Policy(max_tokens=9))
    for _ in range(100):
        if play.failure:
            break
        time.sleep(0.02)
    with pytest.raises(RunError, match="'/no/such/agent': it cannot be started"):
        play.check()
