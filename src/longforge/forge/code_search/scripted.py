"""Scripted agents of varied skill: they answer questions with the real tools, well or badly.

Their transcripts teach the base model the protocol. Their habits are drawn at random and can be read in their
thinking, so that a model that imitates them has choices and reinforcement learning has something to choose.
A scripted agent sees the question and what the tools return, never the index.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from longforge.errors import ToolError
from longforge.forge.code_search.prompts import opening_messages
from longforge.forge.code_search.questions import Question
from longforge.forge.code_search.reward import score
from longforge.protocol import Message, ToolCall

__all__ = [
    "AVERAGE_HABITS",
    "BEST_HABITS",
    "THOUGHTS",
    "Habits",
    "Hit",
    "ScriptedEpisode",
    "ToolRunner",
    "first_word",
    "habit_success",
    "parse_hits",
    "run_scripted",
]

ToolRunner = Callable[[str, dict[str, Any]], str]
"""Runs a tool by name and returns its result; raises `ToolError`."""


@dataclass(frozen=True)
class Habits:
    """Probability of doing each thing well, drawn anew at each decision."""

    precise: float = 0.5
    """Greps for `class X\\b`; otherwise for `X` or its first word alone, whose cut list may miss it."""
    retry: float = 0.4
    """Greps again, precisely, where the list shows no definition; otherwise takes any hit for it."""
    choose: float = 0.75
    """Takes the line that defines the class; otherwise any other line of the list."""
    follow: float = 0.57
    """Goes on to the base class; otherwise stops at X itself."""
    well_ranged: float = 0.62
    """Reads from the class line on; otherwise too early, too late or too little."""
    skip_init: float = 0.8
    """Names the first method besides `__init__`; otherwise the first it sees."""
    careful: float = 0.97
    """Copies names as they are; otherwise misspells, is told so, and tries again."""


THOUGHTS = (
    "find class",
    "look around",
    "no match; find class",
    "not shown; find class",
    "no class; find alias",
    "base is",
    "read from there",
    "read near",
    "no file; read again",
    "answer",
)
"""The words that scripted agents think in, names aside."""

AVERAGE_HABITS = Habits()
BEST_HABITS = Habits(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Hit:
    """One line of a grep result."""

    path: str
    line: int
    text: str


@dataclass(frozen=True)
class ScriptedEpisode:
    """What a scripted agent did. `messages` starts with the system prompt and ends with the answer."""

    question: Question
    messages: tuple[Message, ...]
    answer: str
    correct: bool


class _OutOfTurns(Exception):
    """The agent has to answer now."""


class _Transcript:
    """Messages of one episode as they grow, and the turns that are left."""

    def __init__(self, question: str, run_tool: ToolRunner, max_turns: int) -> None:
        self.messages = opening_messages(question)
        self._run_tool = run_tool
        self._calls_left = max_turns - 1

    def call(self, thinking: str, tool: str, arguments: dict[str, Any]) -> str:
        if self._calls_left == 0:
            raise _OutOfTurns
        self._calls_left -= 1
        call_id = f"call_{len(self.messages) // 2}"
        self.messages.append(
            Message("assistant", "", thinking=thinking, tool_calls=(ToolCall(tool, arguments, call_id),))
        )
        try:
            result = self._run_tool(tool, arguments)
        except ToolError as refusal:
            result = str(refusal)
        self.messages.append(Message("tool", result, tool_call_id=call_id))
        return result

    def answer(self, thinking: str, content: str) -> None:
        self.messages.append(Message("assistant", content, thinking=thinking))


class _Agent:
    """One scripted agent at one question."""

    def __init__(self, transcript: _Transcript, habits: Habits, rng: random.Random) -> None:
        self.habits = habits
        self.guess = "unknown"
        """The best answer so far, given where the turns run out."""
        self._transcript = transcript
        self._rng = rng

    def solve(self, question: Question) -> str:
        wants_path = question.kind in ("defines", "base")
        hit = self._find_class(question.symbol)
        if question.kind in ("base", "base_method") and hit and self._does(self.habits.follow):
            base = _base_expression(hit.text)
            hit = self._find_base(base, hit) if base else hit
        if hit is None:
            return self.guess
        return hit.path if wants_path else self._first_method(hit)

    def _does(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _find_class(self, name: str, thought: str = "", near: Hit | None = None) -> Hit | None:
        """Grep for a class until its definition is seen or the agent settles for less."""
        spelled = name if self._does(self.habits.careful) else _misspell(name, self._rng)
        precise = self._does(self.habits.precise)
        if precise:
            pattern, plan = _class_pattern(spelled), "find class"
        else:
            pattern, plan = spelled if self._does(0.5) else first_word(spelled), "look around"
        hits = self._grep(f"{thought}; {plan}" if thought else plan, pattern)
        if not hits and spelled != name:
            hits = self._grep("no match; find class", _class_pattern(name))
        elif not precise and not _definitions(hits, name) and self._does(self.habits.retry):
            hits = self._grep("not shown; find class", _class_pattern(name))
        return self._choose(hits, name, near)

    def _find_base(self, base: str, subject: Hit) -> Hit | None:
        name = base.split(".")[-1]
        qualifier = base.split(".")[-2:-1]
        near = Hit(qualifier[0], 0, "") if qualifier else subject
        hit = self._find_class(name, f"base is {base}", near)
        if hit is not None:
            return hit
        aliases = self._grep("no class; find alias", rf"{name} = |as {name}\b")
        target = _alias_target(aliases, name)
        return self._find_class(target[0], "", target[1]) if target else None

    def _grep(self, thought: str, pattern: str) -> list[Hit]:
        hits = parse_hits(self._transcript.call(thought, "grep", {"pattern": pattern}))
        if hits:
            self.guess = hits[0].path
        return hits

    def _choose(self, hits: list[Hit], name: str, near: Hit | None) -> Hit | None:
        right = _definitions(hits, name)
        if near is not None:
            right.sort(key=lambda hit: hit.path != near.path and near.path not in re.split(r"[/.]", hit.path))
        if right and (len(hits) == 1 or self._does(self.habits.choose)):
            return right[0]
        others = [hit for hit in hits if hit not in right[:1]]
        return self._rng.choice(others) if others else None

    def _first_method(self, hit: Hit) -> str:
        plan, lines = self._range(hit.line)
        path = hit.path if self._does(self.habits.careful) else _misspell(hit.path, self._rng)
        text = self._transcript.call(plan, "read", {"path": path, **lines})
        if path != hit.path:
            text = self._transcript.call("no file; read again", "read", {"path": hit.path, **lines})
        names = re.findall(r"^ +(?:async )?def (\w+)", text, re.MULTILINE)
        after_init = [name for name in names if name != "__init__"]
        if after_init and self._does(self.habits.skip_init):
            return after_init[0]
        return names[0] if names else "__init__"

    def _range(self, line: int) -> tuple[str, dict[str, int]]:
        if self._does(self.habits.well_ranged):
            return "read from there", {"start": line}
        start = max(1, line + self._rng.choice((-12, 0, 10)))
        return "read near", {"start": start, "end": start + 3} if start == line else {"start": start}


def run_scripted(
    question: Question,
    run_tool: ToolRunner,
    habits: Habits,
    rng: random.Random,
    *,
    max_turns: int = 5,
) -> ScriptedEpisode:
    """Let a scripted agent try one question. `max_turns` counts model calls, the final answer included."""
    transcript = _Transcript(question.text, run_tool, max_turns)
    agent = _Agent(transcript, habits, rng)
    try:
        answer = agent.solve(question)
    except _OutOfTurns:
        answer = agent.guess
    transcript.answer("answer", answer)
    correct = score(answer, question.answer) == 1.0
    return ScriptedEpisode(question, tuple(transcript.messages), answer, correct)


def habit_success(questions: Iterable[Question], run_tool: ToolRunner, habits: Habits, seed: int) -> float:
    """Share of questions that scripted agents of these habits answer rightly.

    With `BEST_HABITS` this is the ceiling for any model; with the habits of the traces it is where a perfect
    imitator starts at temperature 1.
    """
    rng = random.Random(f"habits {seed}")
    episodes = [run_scripted(question, run_tool, habits, rng) for question in questions]
    return sum(episode.correct for episode in episodes) / len(episodes)


def parse_hits(result: str) -> list[Hit]:
    """The hits in a grep result; its other lines (`no match`, `7 more`, errors) are passed over."""
    found = (re.fullmatch(r"(.+?\.py):(\d+): (.*)", line) for line in result.split("\n"))
    return [Hit(m[1], int(m[2]), m[3]) for m in found if m]


def first_word(name: str) -> str:
    """The first word of a CamelCase or snake_case name, with the underscores before it."""
    match = re.match(r"_*(?:[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+)", name)
    return match[0] if match else name


def _class_pattern(name: str) -> str:
    return rf"class {name}\b"


def _definitions(hits: list[Hit], name: str) -> list[Hit]:
    return [hit for hit in hits if re.match(rf"class {re.escape(name)}\s*[(:]", hit.text)]


def _base_expression(text: str) -> str:
    """The only base on a class line, without keyword arguments; "" where the line shows none."""
    match = re.match(r"class \w+\s*\(\s*([A-Za-z_]\w*(?:\.\w+)*)", text)
    return match[1] if match else ""


def _alias_target(hits: list[Hit], name: str) -> tuple[str, Hit] | None:
    for hit in hits:
        match = re.search(rf"\b(\w+) as {name}\b", hit.text) or re.match(
            rf"{name} = (?:\w+\.)*(\w+)$", hit.text
        )
        if match:
            return match[1], hit
    return None


def _misspell(name: str, rng: random.Random) -> str:
    """Drop one letter, or double the last where only one is left."""
    at = rng.randrange(len(name))
    return name[:at] + name[at + 1 :] if len(name) > 1 else name * 2
