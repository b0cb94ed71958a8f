"""An environment and an agent for runs of a random model: real processes, real HTTP, a reward that varies.

python -m small_environment run CONFIG OUT | resume OUT       (what the tests of interrupted runs start)
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from longforge.chat import Tokenizer
from longforge.forge.agents import Agents, HostedAgents
from longforge.forge.config import ForgeConfig, load_config
from longforge.forge.interrupts import Interrupted
from longforge.forge.loop import resume_run, start_run
from longforge.forge.parts import Source
from longforge.model import CausalLM

AGENT_HOST = """
import json, sys, threading, urllib.request
WRITING = threading.Lock()

def chat(body, messages):
    request = urllib.request.Request(
        body["base_url"] + "/chat/completions",
        json.dumps({"model": "policy", "messages": messages}).encode(),
        {"Authorization": "Bearer " + body["api_key"], "Content-Type": "application/json"},
    )
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]

def play(body):
    result = {"id": body["id"], "answer": None, "outcome": "failed", "error": None}
    try:
        messages = [{"role": "user", "content": body["task"]["question"]}]
        messages.append(chat(body, messages))
        messages.append({"role": "user", "content": "and?"})
        result |= {"answer": chat(body, messages)["content"] or "", "outcome": "answered"}
    except OSError as error:
        result["error"] = str(error)
    with WRITING:  # a print's line and its end are two writes
        print(json.dumps(result), flush=True)

for line in sys.stdin:
    body = json.loads(line)
    if "cancel" not in body:
        threading.Thread(target=play, args=(body,), daemon=True).start()
"""


class Lengths:
    """The right answer has an even number of characters: half of what a random model says."""

    def train_tasks(self, seed: int, start: int) -> Iterator[dict[str, Any]]:
        return ({"question": f"train {seed} {n}"} for n in count(start))

    def held_out_tasks(self, seed: int, n: int) -> list[dict[str, Any]]:
        return [{"question": f"held out {seed} {i}"} for i in range(n)]

    def shown(self, task: dict[str, Any]) -> dict[str, Any]:
        return task

    def score(self, task: dict[str, Any], answer: str | None) -> float:
        return float(answer is not None and len(answer) % 2 == 0)

    def readable(self, task: dict[str, Any]) -> dict[str, Any]:
        return {"question": task["question"], "expected": "an even number of characters", "kind": "length"}

    def describe(self) -> dict[str, Any]:
        return {"words": "any"}

    def agents(self, log: Path) -> Agents:
        return HostedAgents([sys.executable, "-c", AGENT_HOST], log, deadline=30.0)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def load_small(config: ForgeConfig, stack: ExitStack) -> Source:
    """What `forge.parts.load_source` does, with the environment above."""
    return Source(CausalLM.from_pretrained(config.model), Tokenizer.load(config.model), Lengths())


def main(verb: str, *paths: str) -> int:
    try:
        if verb == "run":
            start_run(load_config(Path(paths[0])), Path(paths[1]), load=load_small)
        else:
            resume_run(Path(paths[0]), load=load_small)
    except Interrupted:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
