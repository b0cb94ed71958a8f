"""One conversation through every dialect of a real server, streamed and whole: one answer."""

from collections.abc import Callable

import httpx
import torch

from longforge.chat import parse, starts_in_thinking
from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from longforge.server.running import BackgroundServer
from longforge.verify.check import Check
from longforge.verify.compare import Comparison
from longforge.verify.dialect_clients import (
    Said,
    chat,
    chat_streamed,
    completion,
    completion_streamed,
    message,
    message_streamed,
    response,
    response_streamed,
)
from longforge.verify.subject import Subject, Talk

__all__ = ["dialects_agree"]

NAME = "dialects_agree"
ANSWER = 48
"""Tokens of an answer."""
PATIENCE = 120.0
"""Seconds that an answer may take on a busy machine."""

DIALECTS: dict[str, Callable[[httpx.Client, Talk, int], Said]] = {
    "Chat Completions": chat,
    "Chat Completions, streamed": chat_streamed,
    "Completions": completion,
    "Completions, streamed": completion_streamed,
    "Responses": response,
    "Responses, streamed": response_streamed,
    "Messages": message,
    "Messages, streamed": message_streamed,
}

PARTS = ("prompt", "tokens", "prompt_tokens", "answer_tokens", "thinking", "text", "calls", "raw")
"""What is compared, as far as a dialect tells it."""


def dialects_agree(subject: Subject) -> Check:
    """Thinking, text, calls, token counts and, where a dialect tells them, token ids; for a question, and
    for the result of a tool that was called."""
    context = subject.model.config.max_positions
    talks = [subject.talk(len(subject.conversation) - 2), subject.talk(len(subject.conversation))]
    longest = max(len(talk.prompt) for talk in talks)
    if longest + 2 > context:
        return Check(
            NAME, True, f"the context of {context} tokens has no room for a chat: nothing to compare"
        )
    answer = min(ANSWER, context - longest - 1)
    found, told = Comparison(subject), []
    with subject.engine(pages=-(-(longest + answer) // subject.block) + 1) as engine:
        loop = EngineLoop(engine, threads=torch.get_num_threads())
        app = create_app(loop, subject.tokenizer, subject.name)
        with (
            BackgroundServer(app, on_stop=loop.stop) as server,
            httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client,
        ):
            for talk in talks:
                said = {dialect: ask(client, talk, answer) for dialect, ask in DIALECTS.items()}
                told.append(_judged(subject, found, talk, said))
    if found.faults:
        return found.verdict(NAME)
    return Check(
        NAME, True, f"{len(talks)} conversations in {len(DIALECTS)} ways, all equal: {', '.join(told)}"
    )


def _judged(subject: Subject, found: Comparison, talk: Talk, said: dict[str, Said]) -> str:
    """Compares all that was said with the tokens themselves. Returns what these say, in words."""
    truth = _read(subject, talk, said["Chat Completions"].tokens or ())
    for dialect, told in said.items():
        for part in PARTS:
            value, wanted = getattr(told, part), getattr(truth, part)
            found.expect(value is None or value == wanted, f"{dialect}: {part} is {value!r}, not {wanted!r}")
    thinking, text, calls = truth.thinking or "", truth.text or "", truth.calls or ()
    return (
        f"{truth.answer_tokens} tokens ({len(thinking)} characters of thinking, {len(text)} of text, "
        f"{len(calls)} calls)"
    )


def _read(subject: Subject, talk: Talk, tokens: tuple[int, ...]) -> Said:
    """What the tokens of an answer say, read here without the server."""
    tokenizer, family = subject.tokenizer, subject.model.config.family
    text = tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in tokenizer.stop_ids else tokens)
    read = parse(text, family, talk.tools, starts_in_thinking(family, "adaptive"))
    return Said(
        prompt=talk.prompt,
        tokens=tokens,
        prompt_tokens=len(talk.prompt),
        answer_tokens=len(tokens),
        thinking=read.thinking or "",
        text=read.content,
        calls=tuple((call.name, call.arguments) for call in read.tool_calls),
        raw=text,
    )
