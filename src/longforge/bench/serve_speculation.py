"""Our engine with drafted tokens against itself without, on conversations such as the demo model has seen."""

from collections.abc import Iterator, Sequence
from itertools import islice

from longforge.bench.serve_check import check_same
from longforge.bench.serve_ours import Answers, engine_for, generate, logit_gap
from longforge.bench.serve_rates import in_turns
from longforge.bench.serve_rows import Row
from longforge.bench.serve_setting import Setting, say
from longforge.chat import Tokenizer, encode_prompt
from longforge.engine import Engine
from longforge.forge.code_search.index import build_index
from longforge.forge.code_search.scripted import BEST_HABITS
from longforge.forge.code_search.traces import Trace, synthesize

__all__ = ["conversation_prompts", "speculation"]

SEED = 4242
LONGEST_ANSWER = 200
DRAFTS = (1, 2, 3)
MOST_ROUNDS = 3
"""A round is all turns with each number of drafts: long."""


def speculation(s: Setting) -> Iterator[list[Row]]:
    """Tokens a second of one request at a time behind its prompt, with at most 1, 2 and 3 drafts."""
    dtype = s.options.dtypes[0]
    model, tokenizer = s.models[dtype], s.tokenizer
    if tokenizer is None or not model.config.mtp_modules or model.config.has("lightning"):
        say("speculation: left out, the model needs a tokenizer and an MTP module to guess with")
        return
    if s.out_of_time("speculation"):
        return
    prompts = conversation_prompts(tokenizer, s.options.talks, model.config.max_positions - LONGEST_ANSWER)
    longest, stops = max(map(len, prompts)), tokenizer.stop_ids
    engines = {
        drafts: engine_for(model, 1, longest, LONGEST_ANSWER, drafts=drafts) for drafts in (0, *DRAFTS)
    }
    before = {drafts: _accepted(engine) for drafts, engine in engines.items()}
    answers = {
        drafts: [of.tokens[0] for of in _talk(engine, prompts, stops)] for drafts, engine in engines.items()
    }
    if dtype == "fp32":
        for drafts in DRAFTS:
            check_same(f"{drafts} drafts", prompts, answers[drafts], answers[0], logit_gap(model))
    told = {drafts: _acceptance(before[drafts], _accepted(engine)) for drafts, engine in engines.items()}
    runs = {
        str(drafts): lambda engine=engine: _rate(_talk(engine, prompts, stops))
        for drafts, engine in engines.items()
    }
    rates = in_turns(runs, min(MOST_ROUNDS, s.options.rounds), s.deadline)
    yield [
        s.about.row(
            "speculation", "tokens/s", dtype, rates[str(drafts)], "ours, plain", rates["0"],
            drafts=drafts, **told[drafts],
            note=f"{len(prompts)} turns of {s.options.talks} conversations of the code-search agent",
        )
        for drafts in DRAFTS
    ]  # fmt: skip


def conversation_prompts(tokenizer: Tokenizer, talks: int, longest: int) -> list[list[int]]:
    """The prompts of all assistant turns of so many conversations, those of at most `longest` tokens."""
    traces = islice(synthesize(build_index(), seed=SEED, habits=BEST_HABITS), talks)
    prompts = [prompt for trace in traces for prompt in _turns(tokenizer, trace)]
    return [prompt for prompt in prompts if len(prompt) <= longest]


def _turns(tokenizer: Tokenizer, trace: Trace) -> list[list[int]]:
    return [
        encode_prompt(tokenizer, trace.messages[:place], trace.tools)
        for place, message in enumerate(trace.messages)
        if message.role == "assistant"
    ]


def _talk(engine: Engine, prompts: Sequence[Sequence[int]], stops: tuple[int, ...]) -> list[Answers]:
    return [generate(engine, [prompt], LONGEST_ANSWER, stops) for prompt in prompts]


def _rate(talk: Sequence[Answers]) -> float:
    """Tokens behind the first step's of each answer, by the time that they took."""
    times = [answers.times[0] for answers in talk]
    tokens = sum(at > of[0] for of in times for at in of)
    return tokens / sum(of[-1] - of[0] for of in times)


def _accepted(engine: Engine) -> tuple[int, int, tuple[int, ...]]:
    stats = engine.stats()
    return stats.drafted_tokens, stats.accepted_tokens, stats.accepted_by_place


def _acceptance(before: tuple[int, int, tuple[int, ...]], after: tuple[int, int, tuple[int, ...]]) -> Row:
    drafted = after[0] - before[0]
    return {"drafted_tokens": drafted, "acceptance": (after[1] - before[1]) / drafted if drafted else None}
