"""`longforge bench serve`: our engine against transformers on the same weights, in one process."""

from collections.abc import Callable, Iterator, Mapping

import torch

from longforge.bench.contestants import Unusable
from longforge.bench.inputs import DTYPES
from longforge.bench.serve_check import check_same
from longforge.bench.serve_http import http
from longforge.bench.serve_measures import decode, first_tokens, prefill
from longforge.bench.serve_ours import engine_for, generate, logit_gap, random_prompts
from longforge.bench.serve_rates import Deadline
from longforge.bench.serve_rival import WAYS, Rival
from longforge.bench.serve_rows import About, Row
from longforge.bench.serve_setting import MEASURES, ServeOptions, Setting, say
from longforge.bench.serve_speculation import speculation
from longforge.chat import Tokenizer
from longforge.errors import InputError
from longforge.kernels.host_memory import keep_freed_memory
from longforge.model import CausalLM

__all__ = ["bench_serve"]

RUNS: Mapping[str, Callable[[Setting], Iterator[list[Row]]]] = {
    "decode": decode,
    "http": http,
    "speculation": speculation,
    "prefill": prefill,
    "first-token": first_tokens,
}
assert tuple(RUNS) == MEASURES, "options name what there is"
CHECKED_TOKENS = 48


def bench_serve(options: ServeOptions) -> Iterator[list[Row]]:
    """Point after point, its rows; see `About.row` for the columns.

    What happens, and what is left out and why, is told on stderr. Without transformers its numbers are null
    and the note says so. Errors: CheckError where greedy answers of the two sides, or of ours with and
    without its cache, differ beyond rounding; InputError for options that do not fit the model.
    """
    keep_freed_memory()
    deadline = Deadline.after(options.minutes)
    setting = _setting(options, deadline)
    _check(setting)
    for measure in options.measures:
        for rows in RUNS[measure](setting):
            for row in rows:
                say(_told(row))
            yield rows


def _setting(options: ServeOptions, deadline: Deadline) -> Setting:
    models = {name: CausalLM.from_pretrained(options.folder, DTYPES[name]) for name in options.dtypes}
    context = next(iter(models.values())).config.max_positions
    longest = max([options.prompt + options.tokens, *(length + 1 for length in options.prefill)])
    if longest > context:
        raise InputError(f"length: at most the model's {context:,} positions expected, got {longest:,}")
    rivals, missing = {}, ""
    try:
        rivals = {name: Rival(options.folder, DTYPES[name]) for name in options.dtypes}
    except Unusable as error:
        missing = str(error)
        say(f"transformers left out: {missing}")
    tokenizer = Tokenizer.load(options.folder) if (options.folder / "tokenizer.json").is_file() else None
    name = options.folder.resolve().name
    return Setting(options, deadline, About(name), models, rivals, missing, tokenizer)


def _check(s: Setting) -> None:
    """The engine's greedy answers in fp32 are transformers'; without it, those of our whole forward pass."""
    options = s.options
    model = s.models.get("fp32") or CausalLM.from_pretrained(options.folder, torch.float32)
    prompts = random_prompts(model, 2, options.prompt, seed=0)
    tokens = min(CHECKED_TOKENS, options.tokens)
    ours = generate(engine_for(model, 2, options.prompt, tokens), prompts, tokens).tokens
    if s.missing:
        theirs, gap, whose = (
            _by_whole_passes(model, prompts, ours),
            logit_gap(model),
            "our whole forward pass",
        )
    else:
        rival = s.rivals.get("fp32") or Rival(options.folder, torch.float32)
        theirs, gap = rival.generate(prompts, tokens, WAYS[0]).tokens, rival.gap()
        whose = "transformers"
    count = check_same(f"greedy tokens against {whose}", prompts, ours, theirs, gap)
    say(f"check passed: {count} greedy tokens of two prompts are those of {whose}")


def _by_whole_passes(model: CausalLM, prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    """The likeliest token at each place of the answers, given everything before it."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer]))[0]
        found.append(logits[len(prompt) - 1 : -1].argmax(1).tolist())
    return found


def _told(row: Row) -> str:
    what = f"{row['measure']}, {row['dtype']}, batch {row['batch']}"
    against = (
        "" if row["ratio"] is None else f", {row['rival']} {row['rival_value']:.4g} ({row['ratio']:.3g}x)"
    )
    note = f"; {row['note']}" if row["note"] else ""
    return f"{what}: {row['ours']:.4g} {row['unit']}{against}{note}"
