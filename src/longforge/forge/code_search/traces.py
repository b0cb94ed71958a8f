"""What the base model learns from: transcripts of scripted agents, and the tree's own source text.

Subjects of the transcripts come from the train split only. A held-out class may still be seen as a line of
some tool's result or in the source text; no transcript asks about it.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count

from longforge.errors import ToolError
from longforge.forge.code_search.index import CodeIndex
from longforge.forge.code_search.prompts import TOOL_SPECS
from longforge.forge.code_search.questions import Kind, Question, QuestionSet
from longforge.forge.code_search.rename import NamePool, names_in, rename_messages, rename_text
from longforge.forge.code_search.scripted import AVERAGE_HABITS, Habits, ScriptedEpisode, run_scripted
from longforge.forge.code_search.tools import CodeTools
from longforge.protocol import Message, ToolSpec

__all__ = ["Trace", "TraceMaker", "corpus", "synthesize"]


@dataclass(frozen=True)
class Trace:
    """One transcript, ready to be rendered: system prompt, question, calls and results, answer."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    question: Question
    answer: str
    correct: bool
    renamed: bool


class TraceMaker:
    """Numbered traces: number i is always the same trace, whatever was made before it."""

    def __init__(
        self,
        index: CodeIndex,
        tools: CodeTools | None = None,
        *,
        seed: int = 0,
        habits: Habits = AVERAGE_HABITS,
        rename_share: float = 0.7,
        questions: QuestionSet | None = None,
        mix: Mapping[Kind, float] | None = None,
        max_turns: int = 5,
    ) -> None:
        self._tools = tools or CodeTools(index.tree)
        self._questions = questions or QuestionSet(index, limits=self._tools.limits)
        self._stream = self._questions.stream("train", seed, mix)
        self._dealt: list[Question] = []
        self._held_out = {q.symbol for kind in self._questions.questions["held_out"].values() for q in kind}
        self._pool = NamePool(entry.name for entry in index.classes)
        self._seed = seed
        self._habits = habits
        self._rename_share = rename_share
        self._max_turns = max_turns
        self._results: dict[tuple, str] = {}

    def trace(self, number: int) -> Trace:
        """Trace `number`, from 0."""
        while len(self._dealt) <= number:
            self._dealt.append(next(self._stream))
        question = self._dealt[number]
        rng = random.Random(f"trace {self._seed} {number}")
        episode = run_scripted(question, self._run_tool, self._habits, rng, max_turns=self._max_turns)
        renamed = not _misspells(episode) and rng.random() < self._rename_share
        trace = Trace(episode.messages, TOOL_SPECS, question, episode.answer, episode.correct, renamed)
        return self._rename(trace, rng) if renamed else trace

    def _run_tool(self, name: str, arguments: dict) -> str:
        key = (name, *sorted(arguments.items()))
        if key not in self._results:
            try:
                self._results[key] = self._tools.call(name, arguments)
            except ToolError as refusal:
                self._results[key] = str(refusal)
        return self._results[key]

    def _rename(self, trace: Trace, rng: random.Random) -> Trace:
        """The trace under new names; drawn again where the new subject happens to be a held-out class."""
        names = names_in(trace.messages, trace.question.symbol)
        while True:
            messages, table = rename_messages(trace.messages, names, self._pool, rng)
            old = trace.question
            question = replace(
                old,
                symbol=rename_text(old.symbol, table),
                text=messages[1].content,
                answer=rename_text(old.answer, table),
            )
            if question.symbol not in self._held_out:
                return replace(
                    trace,
                    messages=tuple(messages),
                    question=question,
                    answer=rename_text(trace.answer, table),
                )


def synthesize(
    index: CodeIndex,
    tools: CodeTools | None = None,
    seed: int = 0,
    habits: Habits = AVERAGE_HABITS,
    rename_share: float = 0.7,
) -> Iterator[Trace]:
    """Traces without end, numbers 0, 1, 2, ... of a `TraceMaker`."""
    maker = TraceMaker(index, tools, seed=seed, habits=habits, rename_share=rename_share)
    return (maker.trace(number) for number in count())


def corpus(index: CodeIndex, chunk: int = 4000) -> Iterator[str]:
    """The tree's source text in pieces of about `chunk` characters, cut between lines, file after file.

    Pieces that are mostly numbers or escapes (tables of encodings) are left out.
    """
    for file in index.tree.files:
        piece: list[str] = []
        size = 0
        for line in file.text.splitlines(keepends=True):
            piece.append(line)
            size += len(line)
            if size >= chunk:
                yield from _prose("".join(piece))
                piece, size = [], 0
        yield from _prose("".join(piece))


def _prose(piece: str) -> Iterator[str]:
    letters = sum(character.isalpha() or character.isspace() for character in piece)
    if piece and letters >= 0.6 * len(piece):
        yield piece


def _misspells(episode: ScriptedEpisode) -> bool:
    """New names would not carry a spelling mistake over, so such a trace keeps its own."""
    return any((message.thinking or "").startswith(("no match", "no file")) for message in episode.messages)
