"""Decode, prefill and the first token: our engine stepped in this process, and transformers."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from longforge.bench.contestants import Unusable
from longforge.bench.serve_check import check_same
from longforge.bench.serve_ours import engine_for, first_token, generate, random_prompts
from longforge.bench.serve_rates import Deadline, Spread, decode_rate, in_turns, spread
from longforge.bench.serve_rival import Rival, Way
from longforge.bench.serve_rows import Row, headline
from longforge.bench.serve_setting import Setting
from longforge.errors import CheckError
from longforge.model import CausalLM

__all__ = ["decode", "first_tokens", "prefill"]

ROOM = 4 << 30
"""Bytes that transformers may take for the masks and scores of one layer."""
HITS = 3
LONG_PROMPT = 16_384
"""Prompts from this length on go through cold once only."""


def decode(s: Setting) -> Iterator[list[Row]]:
    """Tokens a second of all requests together, behind the prompts, for each batch size."""
    for batch in s.options.batches:
        if s.out_of_time(f"decode, batch {batch}"):
            return
        yield headline([_decode(s, dtype, batch) for dtype in s.options.dtypes])


def _decode(s: Setting, dtype: str, batch: int) -> Row:
    options, model = s.options, s.models[dtype]
    size, tokens = options.prompt, options.tokens
    prompts = random_prompts(model, batch, size, seed=batch)
    engine = engine_for(model, batch, size, tokens)
    rival, note = s.rivals.get(dtype), s.missing
    runs: dict[str, Callable[[], float]] = {
        "ours": lambda: decode_rate(generate(engine, prompts, tokens).times)
    }
    ours = generate(engine, prompts, tokens)
    if rival is not None:
        note = f"continuous batching: {rival.batching}" if rival.batching else ""
        for way in rival.fastest(prompts, tokens, 2, options.compiled):
            run = _generate_run(rival, prompts, tokens, way)
            if dtype == "fp32":
                check_same(f"{way}, batch {batch}", prompts, ours.tokens, run().tokens, rival.gap())
            runs[f"transformers generate, {way}"] = lambda run=run: decode_rate(run().times)
        if rival.batching is None:
            rival.generate_batching(prompts, tokens)
            runs["transformers continuous batching"] = lambda: decode_rate(
                rival.generate_batching(prompts, tokens).times
            )
    rates = in_turns(runs, options.rounds, s.deadline)
    name, theirs = _fastest(rates)
    return s.about.row(
        "decode", "tokens/s", dtype, rates["ours"], name, theirs,
        batch=batch, prompt=size, tokens=tokens, note=note, rivals=_all(rates),
    )  # fmt: skip


def _generate_run(rival: Rival, prompts: list[list[int]], tokens: int, way: Way):
    return lambda: rival.generate(prompts, tokens, way)


def _fastest(rates: dict[str, Spread]) -> tuple[str, Spread | None]:
    rivals = {name: rate for name, rate in rates.items() if name != "ours"}
    if not rivals:
        return "transformers", None
    name = max(rivals, key=lambda name: rivals[name].middle)
    return name, rivals[name]


def _all(rates: dict[str, Spread]) -> dict[str, float]:
    return {name: rate.middle for name, rate in rates.items() if name != "ours"}


def prefill(s: Setting) -> Iterator[list[Row]]:
    """Prompt tokens a second of one prompt, until its last token's logits are there."""
    for length in s.options.prefill:
        if s.out_of_time(f"prefill {length}"):
            return
        yield headline([_prefill(s, dtype, length) for dtype in s.options.dtypes])


def _prefill(s: Setting, dtype: str, length: int) -> Row:
    model = s.models[dtype]
    [prompt] = random_prompts(model, 1, length, seed=length)
    engine = engine_for(model, 1, length, 1)

    def ours() -> float:
        answers = generate(engine, [prompt], 1)
        return length / (answers.times[0][0] - answers.begun)

    ours()
    runs: dict[str, Callable[[], float]] = {"ours": ours}
    rival, note = s.rivals.get(dtype), s.missing
    if rival is not None:
        note = ""
        needed = rival.prefill_bytes(length)
        if needed > ROOM:
            note = f"transformers left out, it needs about {needed / 2**30:.0f} GiB for masks and scores"
        else:
            try:
                way = rival.fastest_prefill(prompt)
                runs[f"transformers forward, {way}"] = lambda: length / rival.prefill(prompt, way)
            except Unusable as error:
                note = str(error)
    rates = in_turns(runs, s.options.rounds, s.deadline)
    name, theirs = _fastest(rates)
    return s.about.row(
        "prefill", "tokens/s", dtype, rates["ours"], name, theirs, prompt=length, tokens=1, note=note
    )


def first_tokens(s: Setting) -> Iterator[list[Row]]:
    """Milliseconds until the first token of a prompt that is in the prefix cache, and of one that is not."""
    dtype = s.options.dtypes[0]
    for length in s.options.first_token:
        if s.out_of_time(f"time to first token {length}"):
            return
        row = _first_token(s, dtype, length)
        yield [] if row is None else [row]


def _first_token(s: Setting, dtype: str, length: int) -> Row | None:
    model, config, note = s.models[dtype], s.models[dtype].config, ""
    if length + 1 > config.max_positions:
        note = f"context raised from {config.max_positions:,}"
        model.config = replace(config, max_positions=length + config.block_size)
    rounds = 1 if length >= LONG_PROMPT else s.options.rounds
    try:
        cold, hit = _cold_and_hit(model, length, rounds, s.deadline)
    finally:
        model.config = config
    if not cold:
        s.out_of_time(f"time to first token {length}, begun")
        return None
    return s.about.row(
        "time to first token, hit / cold", "ms", dtype, spread(hit), "ours, cold", spread(cold),
        prompt=length, tokens=1, note=note, rival_rounds=len(cold),
    )  # fmt: skip


def _cold_and_hit(
    model: CausalLM, length: int, rounds: int, deadline: Deadline
) -> tuple[list[float], list[float]]:
    """Milliseconds of new prompts, and of the same again, HITS times each; as many as there was time for."""
    engine = engine_for(model, 1, length, 1, cache=True)
    engine.warm_up()
    cold: list[float] = []
    hit: list[float] = []
    for number in range(rounds):
        [prompt] = random_prompts(model, 1, length, seed=length + number)
        first = first_token(engine, prompt, deadline)
        if first is None:
            break
        cold.append(1e3 * first[0])
        for _ in range(HITS):
            again = first_token(engine, prompt)
            assert again is not None, "no deadline was given"
            seconds, cached = again
            if cached < length - 2 * model.config.block_size:
                raise CheckError(
                    f"bench serve: the prompt's {length} tokens expected in the cache, {cached} found; "
                    "nothing is reported while the check fails"
                )
            hit.append(1e3 * seconds)
    return cold, hit
