"""A real server on a free port, over a small model that may have been taught a dialogue."""

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai

from longforge.chat import Tokenizer, encode_prompt, render
from longforge.engine import Engine
from longforge.engine.grammar import Grammars
from longforge.model import CausalLM
from longforge.protocol import Message, ToolCall, ToolSpec
from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from longforge.server.running import BackgroundServer
from small_model import small_model, small_tokenizer, teach

GREP = ToolSpec("grep", "", {"type": "object", "properties": {"limit": {"type": "integer"}}})
QUESTION = Message("user", "Where?")
CALL = ToolCall("grep", {"limit": 3})
FOUND = "café ☕"

HTTP = httpx.Client(timeout=120, trust_env=False)
"""Patient: on a busy machine an answer may take a while, and that is no failure."""


@dataclass(frozen=True)
class Served:
    """A running server and what is behind it."""

    url: str
    loop: EngineLoop
    model: CausalLM
    tokenizer: Tokenizer

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


def answer_ids(conversation: list[Message], answer: Message, tools: tuple[ToolSpec, ...]) -> list[int]:
    """What the model must sample to give `answer`, the end of its turn included."""
    asked = render(conversation, tools)
    answered = render([*conversation, answer], tools, add_generation_prompt=False)
    assert answered.startswith(asked)
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(answered[len(asked) :])
    return ids[: ids.index(tokenizer.eos_id) + 1]


def taught_model() -> CausalLM:
    """Calls grep when asked, and tells what was found when it gets the result; thinks first, both times."""
    tokenizer = small_tokenizer()
    called = Message("assistant", "", "hm", (CALL,))
    talks = [
        ([QUESTION], called),
        ([QUESTION, called, Message("tool", "a.py", tool_call_id="x")], Message("assistant", FOUND, "ah")),
    ]
    dialogues = [
        (encode_prompt(tokenizer, talk, (GREP,)), answer_ids(talk, answer, (GREP,))) for talk, answer in talks
    ]
    dialogues.append((encode_prompt(tokenizer, [QUESTION]), answer_ids([QUESTION], called, ())))
    return teach(small_model(max_positions=1024, hidden_size=192), dialogues)


def serving(model: CausalLM) -> Iterator[Served]:
    tokenizer = small_tokenizer()
    grammars = Grammars(tokenizer, model.config.vocab_size)
    engine = Engine(model, pages=700, max_running=4, grammars=grammars)
    loop = EngineLoop(engine, threads=1)
    with BackgroundServer(create_app(loop, tokenizer, "small"), on_stop=loop.stop) as server:
        yield Served(server.url, loop, model, tokenizer)
