"""transformers' side: the same checkpoint, generated from in every way it has, each as well as it can be run.

Ways differ in the attention function, the form of the experts and the cache. Prompts of a batch are equally
long, so that no padding is computed. Times of tokens come from a stopping criterion that never stops.
Imports transformers where it is loaded, not with this module.
"""

import itertools
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longforge.bench.contestants import OLDEST_TRANSFORMERS, Unusable
from longforge.bench.serve_ours import Answers
from longforge.bench.serve_rates import decode_rate
from longforge.model.checkpoint import config_of

__all__ = ["Rival", "Way"]

FAILURES = (Unusable, RuntimeError, ValueError, TypeError, ImportError, AttributeError)
"""What transformers and torch say where they cannot run a way on this machine: they have no error of
their own for it. A way that answers wrongly is caught by the check instead."""
TRIAL_TOKENS = 12
SLOW_PREFILL = 0.5
"""Seconds."""


@dataclass(frozen=True)
class Way:
    """One way to generate."""

    attention: str
    experts: str
    cache: str
    compiled: bool = False

    def __str__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        return f"{self.attention}, experts {self.experts}, {self.cache} cache{compiled}"


WAYS = tuple(
    Way(*names)
    for names in itertools.product(
        ("sdpa", "eager"), ("grouped_mm", "batched_mm", "eager"), ("dynamic", "static")
    )
)


class Rival:
    """A model of transformers with the weights of a folder. Raises Unusable where there can be none."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        _check_version()
        self._lm: Any = _language_model(folder, dtype).eval()
        self._lm.generation_config.eos_token_id = None  # answers of equal length
        self.batching = self._continuous_batching()
        """Why its continuous batching does not serve this model; None where it does."""

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, way: Way) -> Answers:
        """Greedy answers of `tokens` tokens to prompts of equal length."""
        from transformers import StoppingCriteriaList

        self._choose(way)
        ids = torch.tensor(prompts)
        clock = _Clock(len(prompts))
        begun = time.perf_counter()
        out = self._lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_greedy(tokens, way),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        answers = out[:, ids.shape[1] :].tolist()
        return Answers(answers, [clock.times] * len(prompts), begun)

    def generate_batching(self, prompts: Sequence[Sequence[int]], tokens: int) -> Answers:
        """The same through its continuous batching; only where `batching` is None."""
        begun = time.perf_counter()
        out = self._lm.generate_batch(
            [list(p) for p in prompts], generation_config=_greedy(tokens), record_timestamps=True
        )
        results = list(out.values())  # in the order of the prompts
        return Answers([list(r.generated_tokens) for r in results], [r.timestamps for r in results], begun)

    def prefill(self, prompt: Sequence[int], way: Way) -> float:
        """Seconds of a forward pass over a prompt that fills a cache and gives the last token's logits."""
        self._choose(way)
        ids = torch.tensor([list(prompt)])
        begun = time.perf_counter()
        with torch.inference_mode():
            self._lm(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun

    def prefill_bytes(self, length: int) -> int:
        """About what such a pass takes for masks and scores of one layer: four of [heads, length, length]."""
        return 4 * self._lm.config.num_attention_heads * length * length * self._lm.dtype.itemsize

    def fastest(self, prompts: Sequence[Sequence[int]], tokens: int, count: int, compiled: bool) -> list[Way]:
        """The `count` ways that decode these prompts fastest, by a short trial of each.

        tokens: of an answer; what is compiled is compiled for that length. compiled: whether the experts that
        are fastest without are tried compiled as well. torch.compile takes the static cache only, and the
        first answer waits for it long: 30 s and more on two cores.
        """
        rates = {way: rate for way in WAYS if (rate := self._trial(prompts, min(TRIAL_TOKENS, tokens), way))}
        if not rates:
            raise Unusable("no way to generate runs here")
        if compiled:
            way = Way("sdpa", max(rates, key=lambda way: rates[way]).experts, "static", compiled=True)
            rates[way] = self._trial(prompts, tokens, way)
        return sorted(rates, key=lambda way: -rates[way])[:count]

    def _trial(self, prompts: Sequence[Sequence[int]], tokens: int, way: Way) -> float:
        """Tokens a second of a second answer, the first paying for what is made once; 0 where it fails."""
        try:
            with _quiet():
                if way.compiled:  # or the second batch size gets code for any size, which is slower
                    torch.compiler.reset()
                self.generate(prompts, tokens if way.compiled else 2, way)
                return decode_rate(self.generate(prompts, tokens, way).times)
        except FAILURES:
            return 0.0

    def fastest_prefill(self, prompt: Sequence[int]) -> Way:
        """The way that computes such a prompt fastest, by two trials of each, or one where it is slow."""
        seconds: dict[Way, float] = {}
        for way in WAYS:
            if way.cache == "dynamic":
                try:
                    seconds[way] = self.prefill(prompt, way)
                    if seconds[way] < SLOW_PREFILL:
                        seconds[way] = min(seconds[way], self.prefill(prompt, way))
                except FAILURES:
                    continue
        if not seconds:
            raise Unusable("no way to compute a prompt runs here")
        return min(seconds, key=lambda way: seconds[way])

    def gap(self) -> Callable[[Sequence[int], int, int], float]:
        """How far apart its logits of two next tokens are after some tokens."""
        self._choose(WAYS[0])

        def gap(ids: Sequence[int], one: int, other: int) -> float:
            with torch.inference_mode():
                logits: Tensor = self._lm(input_ids=torch.tensor([list(ids)])).logits[0, -1]
            return abs(float(logits[one] - logits[other]))

        return gap

    def _choose(self, way: Way) -> None:
        self._lm.set_attn_implementation(way.attention)
        self._lm.set_experts_implementation(way.experts)

    def _continuous_batching(self) -> str | None:
        try:
            with _quiet(), redirect_stdout(sys.stderr):  # it prints where it fails; stdout is for rows
                out = self._lm.generate_batch([[1, 2, 3]], generation_config=_greedy(2))
            failed = [str(result.error) for result in out.values() if result.error]
            tokens = [len(result.generated_tokens) for result in out.values()]
        except FAILURES as error:
            return _first_line(error)
        if failed or tokens != [2]:
            return failed[0] if failed else f"2 tokens asked for, {tokens} came"
        return None


def _greedy(tokens: int, way: Way = WAYS[0]) -> Any:
    from transformers import CompileConfig, GenerationConfig

    compiling: Any = CompileConfig(fullgraph=True)
    compiling._compile_all_devices = way.compiled  # without it, transformers compiles on accelerators only
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=0,
        use_cache=True,
        cache_implementation=None if way.cache == "dynamic" else way.cache,
        compile_config=compiling,
        disable_compile=not way.compiled,
    )


class _Clock:
    """In the place of a stopping criterion: notes when each token is there and stops nothing."""

    def __init__(self, batch: int) -> None:
        self.times: list[float] = []
        self._go_on = torch.zeros(batch, dtype=torch.bool)

    def __call__(self, ids: Tensor, scores: Tensor, **more: object) -> Tensor:
        self.times.append(time.perf_counter())
        return self._go_on


def _check_version() -> None:
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise Unusable("transformers is not installed") from None
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if numbers < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise Unusable(f"transformers {oldest} or later expected, {found} found")


def _language_model(folder: Path, dtype: torch.dtype) -> Any:
    """The text model alone; a checkpoint in M3's released form has a tower of pictures beside it."""
    import transformers

    with _quiet():
        try:
            if config_of(folder).family == "m2":
                return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            whole: Any = transformers.MiniMaxM3SparseForConditionalGeneration.from_pretrained(
                folder, dtype=dtype
            )
        except FAILURES as error:
            raise Unusable(f"transformers does not read the folder: {_first_line(error)}") from error
    with torch.device("meta"):
        text: Any = transformers.MiniMaxM3VLForCausalLM(whole.config.text_config)
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    return text


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the reports of transformers and of torch's compiler on stderr."""
    from transformers.utils import logging as reports

    bars, disabled = reports.is_progress_bar_enabled(), logging.root.manager.disable
    reports.disable_progress_bar()
    logging.disable(logging.CRITICAL)  # some of its loggers are outside of the package's own settings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            reports.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
