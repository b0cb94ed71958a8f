"""How often a model answers held-out questions with the real tools: the plain agent loop, inside one process.

The demo measures the same through HTTP, the gateway and the agent program; this is the quick look while the
base model is made, with the same prompts, tools, sampling and judge.

    .venv/bin/python scripts/base_model_habits.py MODEL --temperature 0      measures any model folder
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from longforge.chat import Tokenizer, encode_prompt, parse
from longforge.engine import Engine, GenerationRequest
from longforge.errors import ToolError
from longforge.forge.code_search.index import build_index
from longforge.forge.code_search.prompts import TOOL_SPECS, opening_messages
from longforge.forge.code_search.questions import KINDS, Question, QuestionSet
from longforge.forge.code_search.reward import score
from longforge.forge.code_search.tools import CodeTools
from longforge.model import CausalLM
from longforge.protocol import Message, SamplingParams


@dataclass
class Try:
    """One episode on its way."""

    name: str
    question: Question
    messages: list[Message]
    sampled: list[int] = field(default_factory=list)
    turns: int = 0
    answer: str | None = None


@dataclass(frozen=True)
class HabitScores:
    """Success over all questions and by kind."""

    n: int
    success: float
    half_width: float
    """Half of the 95 % interval (normal approximation)."""
    by_kind: Mapping[str, tuple[int, int]]
    """kind -> (right, asked)"""
    calls: float
    """Tool calls per episode."""
    answered: float
    """Share that ended with an answer within the turns."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_habits(
    model: CausalLM,
    tokenizer: Tokenizer,
    tools: CodeTools,
    questions: Sequence[Question],
    *,
    temperature: float = 1.0,
    max_turns: int = 5,
    max_tokens: int = 96,
    seed: int = 0,
) -> tuple[HabitScores, list[Try]]:
    """Lets the model try each question once, all at the same time. Leaves the model in evaluation mode."""
    began = time.perf_counter()
    block = model.config.block_size
    engine = Engine(model, pages=64 * (2048 // block), max_running=64)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop_token_ids=tokenizer.stop_ids)
    tries = {
        str(i): Try(str(i), question, opening_messages(question.text)) for i, question in enumerate(questions)
    }
    for attempt in tries.values():
        _ask(engine, tokenizer, attempt, params, seed)
    while engine.has_work:
        for event in engine.step():
            attempt = tries[event.request_id.partition("/")[0]]
            attempt.sampled.append(event.token_id)
            if event.stop_reason is not None and _act(attempt, tokenizer, tools, max_turns):
                _ask(engine, tokenizer, attempt, params, seed)
    return _scores(list(tries.values()), time.perf_counter() - began), list(tries.values())


def _ask(engine: Engine, tokenizer: Tokenizer, attempt: Try, params: SamplingParams, seed: int) -> None:
    prompt = tuple(encode_prompt(tokenizer, attempt.messages, TOOL_SPECS))
    attempt.sampled = []
    attempt.turns += 1
    number = (seed * 1_000_003 + int(attempt.name)) * 101 + attempt.turns
    drawn = SamplingParams(**{**asdict(params), "seed": number})
    engine.submit(GenerationRequest(f"{attempt.name}/{attempt.turns}", prompt, drawn))


def _act(attempt: Try, tokenizer: Tokenizer, tools: CodeTools, max_turns: int) -> bool:
    """Reads the model's turn, runs its tools. Returns whether the model is asked again."""
    ids = attempt.sampled[:-1] if attempt.sampled[-1] in tokenizer.stop_ids else attempt.sampled
    message = parse(tokenizer.decode(ids), "m3", TOOL_SPECS)
    attempt.messages.append(message)
    if not message.tool_calls:
        attempt.answer = message.content
        return False
    for call in message.tool_calls:
        try:
            result = tools.call(call.name, call.arguments)
        except ToolError as refusal:
            result = str(refusal)
        attempt.messages.append(Message("tool", result, tool_call_id=call.id))
    return attempt.turns < max_turns


def _scores(tries: Sequence[Try], seconds: float) -> HabitScores:
    asked = Counter(attempt.question.kind for attempt in tries)
    right = Counter(
        attempt.question.kind for attempt in tries if score(attempt.answer, attempt.question.answer) == 1.0
    )
    n, good = len(tries), sum(right.values())
    share = good / n
    return HabitScores(
        n=n,
        success=share,
        half_width=1.96 * math.sqrt(share * (1 - share) / n),
        by_kind={kind: (right[kind], asked[kind]) for kind in KINDS if asked[kind]},
        calls=sum(len(m.tool_calls) for t in tries for m in t.messages) / n,
        answered=sum(t.answer is not None for t in tries) / n,
        seconds=seconds,
    )


def main() -> None:
    """Measures a model folder on the questions that its card is about, and prints the scores as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--questions", type=int, default=256)
    options = parser.parse_args()
    index = build_index()
    scores, _ = evaluate_habits(
        CausalLM.from_pretrained(options.model, dtype=torch.float32).eval(),
        Tokenizer.load(options.model),
        CodeTools(index.tree),
        QuestionSet(index).sample("held_out", 20, 400)[: options.questions],
        temperature=options.temperature,
        seed=1,
    )
    print(json.dumps(scores.as_json()))


if __name__ == "__main__":
    main()
