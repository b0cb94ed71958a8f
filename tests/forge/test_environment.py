"""Code search as an environment: real agent, sandbox and gateway; only the model is canned."""

import json
import queue
import re
from pathlib import Path

import httpx
import pytest

from longforge.chat import train_tokenizer
from longforge.errors import InputError
from longforge.forge.background import BackgroundLoop, HttpServer
from longforge.forge.config import AgentConfig, EnvironmentConfig
from longforge.forge.engine_client import EngineClient
from longforge.forge.environment import CodeSearch
from longforge.forge.gateway import Gateway, Policy
from longforge.forge.memory_pool import MemoryPool
from longforge.forge.rollout import Rollouts
from longforge.protocol import Episode, Group

NAMES = [
    f"{a}{b}" for a in ("Stone", "River", "Cloud", "Field", "Ember") for b in ("Keeper", "Reader", "Maker")
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name in NAMES:
        (root / f"{name.lower()}.py").write_text(f"class {name}:\n    def open(self):\n        pass\n")
    return root


@pytest.fixture(scope="module")
def environment(tree):
    config = EnvironmentConfig(tree=str(tree), mix={"defines": 1.0})
    made = CodeSearch(config, AgentConfig(max_calls=3, deadline=30.0), max_tokens=64)
    yield made
    made.close()


class Searcher:
    """A model that greps for the class it is asked about and answers with the file of the first hit."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, request: httpx.Request) -> httpx.Response:
        prompt = self.tokenizer.decode(json.loads(request.content)["prompt"])
        hits = re.findall(r"([\w/]+\.py):\d+", prompt)
        name = re.search(r"defines class (\w+)", prompt)[1]
        p = "]<]minimax[>["
        pattern = f"{p}<pattern>class {name}{p}</pattern>"
        call = f'{p}<tool_call>\n{p}<invoke name="grep">{pattern}{p}</invoke>\n{p}</tool_call>'
        ids = self.tokenizer.encode((hits[0] if hits else call) + "[e~[")
        logprobs = {"token_logprobs": [-1.0] * len(ids)}
        choice = {
            "token_ids": ids,
            "logprobs": logprobs,
            "finish_reason": "stop",
            "weight_versions": [0] * len(ids),
        }
        return httpx.Response(200, json={"choices": [choice]})


def test_tasks_are_a_function_of_the_seed_and_held_out_ones_never_train(environment):
    held_out = environment.held_out_tasks(3, 2)
    assert held_out == environment.held_out_tasks(3, 2)
    stream = environment.train_tasks(3, 0)
    first = [next(stream) for _ in range(40)]
    later = environment.train_tasks(3, 15)
    assert [next(later) for _ in range(25)] == first[15:]
    assert not {t["symbol"] for t in held_out} & {t["symbol"] for t in first}
    with pytest.raises(InputError, match="the tree supports"):
        environment.held_out_tasks(3, 5000)


def test_the_agent_is_not_told_the_answer_and_only_the_answer_is_rewarded(environment):
    (task,) = environment.held_out_tasks(0, 1)
    assert task["answer"] not in json.dumps(environment.shown(task))
    assert environment.score(task, task["answer"]) == 1.0
    assert environment.score(task, "or " + task["answer"]) == environment.score(task, None) == 0.0


def test_the_agent_searches_and_answers_through_the_gateway(environment, tmp_path):
    tokenizer = train_tokenizer(["Which file defines class grep pattern path read lines .py"] * 3, 400)
    pool, ends = MemoryPool(), queue.Queue()
    tasks = environment.held_out_tasks(1, 3)
    with BackgroundLoop() as loop:
        engine = EngineClient("http://engine", "m", transport=httpx.MockTransport(Searcher(tokenizer)))
        gateway = Gateway(
            tokenizer=tokenizer, engine=engine, pool=pool, family="m3", context=4000, model_name="m", seed=0
        )
        server = HttpServer(gateway.app, loop)
        agents = environment.agents(tmp_path / "agent.log")
        loop.run(agents.start())
        play = Rollouts(
            loop=loop,
            gateway=gateway,
            gateway_url=server.url,
            agents=agents,
            environment=environment,
            pool=pool,
            deadline=30.0,
            concurrency=2,
            ended=ends.put,
        )
        episodes = tuple(Episode(f"g/{i}", "g", task) for i, task in enumerate(tasks))
        play.submit(Group("g", 0, episodes), phase="train", step=0, policy=Policy(max_tokens=200))
        found = [ends.get(timeout=30).episode for _ in tasks]
        loop.run(agents.close())
        server.close()
    assert [e.outcome for e in found] == ["answered"] * 3, (tmp_path / "agent.log").read_text()
    assert [e.reward for e in found] == [1.0] * 3, found[0].record["messages"]
    episode = pool.group("g").episodes[0]
    first, second = episode.calls
    assert second.parent_id == first.call_id, "the reply came back as it was sampled"
    roles = [message["role"] for message in episode.record["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert environment.readable(episode.task)["expected"] == episode.record["answer"]
