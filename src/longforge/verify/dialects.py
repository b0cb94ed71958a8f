"""One conversation through every dialect of a real server, streamed and whole: one answer."""

from collections.abc import Callable

import httpx

from longforge.chat import parse
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
from longforge.verify.subject import Subject

__all__ = ["dialects_agree"]

NAME = "dialects_agree"
ANSWER = 48
"""Tokens of an answer."""
PATIENCE = 120.0
"""Seconds that an answer may take on a busy machine."""

DIALECTS: dict[str, Callable[[httpx.Client, Subject, int], Said]] = {
    "Chat Completions": chat,
    "Chat Completions, streamed": chat_streamed,
    "Completions": completion,
    "Completions, streamed": completion_streamed,
    "Responses": response,
    "Responses, streamed": response_streamed,
    "Messages": message,
    "Messages, streamed": message_streamed,
}


def dialects_agree(subject: Subject) -> Check:
    """Thinking, text, calls, token counts and, where a dialect tells them, token ids."""
    prompt, context = subject.chat(), subject.model.config.max_positions
    if len(prompt) + 2 > context:
        return Check(
            NAME, True, f"the context of {context} tokens has no room for a chat: nothing to compare"
        )
    answer = min(ANSWER, context - len(prompt) - 1)
    pages = -(-(len(prompt) + answer) // subject.block) + 1
    said: dict[str, Said] = {}
    with subject.engine(pages=pages) as engine:
        loop = EngineLoop(engine)
        app = create_app(loop, subject.tokenizer, subject.name)
        with (
            BackgroundServer(app, on_stop=loop.stop) as server,
            httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client,
        ):
            for dialect, ask in DIALECTS.items():
                said[dialect] = ask(client, subject, answer)
    return _judged(subject, prompt, said)


def _judged(subject: Subject, prompt: tuple[int, ...], said: dict[str, Said]) -> Check:
    found = Comparison(subject)
    tokens = said["Chat Completions"].tokens or ()
    truth = _read(subject, prompt, tokens)
    for dialect, told in said.items():
        for part in (
            "prompt",
            "tokens",
            "prompt_tokens",
            "answer_tokens",
            "thinking",
            "text",
            "calls",
            "raw",
        ):
            value = getattr(told, part)
            wanted = getattr(truth, part)
            found.expect(value is None or value == wanted, f"{dialect}: {part} is {value!r}, not {wanted!r}")
    if found.faults:
        return found.verdict(NAME)
    kinds = f"{len(truth.thinking or '')} characters of thinking, {len(truth.text or '')} of text"
    told = f"{len(tokens)} tokens each ({kinds}, {len(truth.calls or ())} calls), all equal"
    return Check(NAME, True, f"{len(said)} ways to ask, {told}")


def _read(subject: Subject, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Said:
    """What the tokens of an answer say, read here without the server."""
    tokenizer = subject.tokenizer
    shown = tokens[:-1] if tokens and tokens[-1] in tokenizer.stop_ids else tokens
    text = tokenizer.decode(shown)
    read = parse(text, subject.model.config.family, subject.tools, subject.model.config.family == "m2")
    calls = tuple((call.name, call.arguments) for call in read.tool_calls)
    return Said(
        prompt=prompt,
        tokens=tokens,
        prompt_tokens=len(prompt),
        answer_tokens=len(tokens),
        thinking=read.thinking or "",
        text=read.content,
        calls=calls,
        raw=text,
    )
