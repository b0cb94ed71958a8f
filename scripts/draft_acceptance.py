"""How often the draft module's guesses are right, by place: an engine that always guesses three tokens.

.venv/bin/python scripts/draft_acceptance.py MODEL      measures any model folder, prints JSON
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longforge.bench.serve_speculation import conversation_prompts
from longforge.chat import Tokenizer, encode_prompt
from longforge.engine import Engine, GenerationRequest
from longforge.engine.draft_length import DraftCosts
from longforge.forge.code_search.index import CodeIndex, build_index
from longforge.forge.code_search.prompts import TOOL_SPECS
from longforge.forge.code_search.questions import QuestionSet
from longforge.forge.code_search.scripted import BEST_HABITS, run_scripted
from longforge.forge.code_search.tools import CodeTools
from longforge.model import CausalLM
from longforge.protocol import Message, SamplingParams

DRAFTS = 3
TALKS = 24
LONGEST_ANSWER = 200
FREE = DraftCosts(rows=(1,), step=(1.0,), draft=(0.0,))
"""Under these as many tokens as allowed are guessed."""


@dataclass(frozen=True)
class Acceptance:
    """Greedy answers to one prompt at a time, with as many guesses as allowed."""

    turns: int
    tokens: int
    tokens_per_step: float
    guesses: tuple[tuple[int, int], ...]
    """Per place: how many were right, of those behind right ones alone."""


def measure(folder: Path, index: CodeIndex, talks: int = TALKS) -> dict[str, dict[str, Any]]:
    """Acceptance of the model in `folder`: in the conversations that `longforge bench serve` measures, and in
    conversations about held-out classes."""
    model, tokenizer = CausalLM.from_pretrained(folder, dtype=torch.float32).eval(), Tokenizer.load(folder)
    longest = model.config.max_positions - LONGEST_ANSWER
    sides: Mapping[str, list[list[int]]] = {
        "bench": conversation_prompts(tokenizer, talks, longest),
        "held_out": [p for p in _held_out_prompts(tokenizer, index, talks) if len(p) <= longest],
    }
    return {side: asdict(acceptance(model, tokenizer, prompts)) for side, prompts in sides.items()}


def acceptance(model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> Acceptance:
    """Counts each verification apart: the engine holds one request, so what a step adds is that request's."""
    pages = -(-(max(map(len, prompts)) + LONGEST_ANSWER + DRAFTS) // model.config.block_size) + 1
    engine = Engine(model, pages=pages, max_running=1, drafts=DRAFTS, draft_costs=FREE, prefix_cache=False)
    params = SamplingParams(max_tokens=LONGEST_ANSWER, temperature=0.0, stop_token_ids=tokenizer.stop_ids)
    guesses = [[0, 0] for _ in range(DRAFTS)]
    steps = 0
    for number, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(str(number), tuple(prompt), params))
        while engine.has_work:
            before = engine.stats()
            engine.step()
            after = engine.stats()
            steps += after.generated_tokens > before.generated_tokens
            right = after.accepted_tokens - before.accepted_tokens
            for place in range(after.drafted_tokens - before.drafted_tokens):
                guesses[place][0] += right > place
                guesses[place][1] += right >= place
    tokens = engine.stats().generated_tokens
    pairs = tuple((right, asked) for right, asked in guesses)
    return Acceptance(len(prompts), tokens, tokens / steps, pairs)


def _held_out_prompts(tokenizer: Tokenizer, index: CodeIndex, talks: int) -> list[list[int]]:
    tools, rng = CodeTools(index.tree), random.Random(5)
    questions = QuestionSet(index).sample("held_out", 7, talks)
    episodes = [run_scripted(question, tools.call, BEST_HABITS, rng) for question in questions]
    return [prompt for episode in episodes for prompt in _turns(tokenizer, episode.messages)]


def _turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[list[int]]:
    return [
        encode_prompt(tokenizer, messages[:place], TOOL_SPECS)
        for place, message in enumerate(messages)
        if message.role == "assistant"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--talks", type=int, default=TALKS, help="conversations of each kind")
    options = parser.parse_args()
    print(json.dumps(measure(options.model, build_index(), options.talks), indent=1))


if __name__ == "__main__":
    main()
