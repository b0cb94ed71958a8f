"""One prompt of a million tokens on one machine: what a chunk costs by its position, and what comes after.

    .venv/bin/python benchmarks/million_tokens.py       writes benchmarks/results/million-tokens.json and .png

A model in bf16 with its context raised reads random token ids through the engine, chunk by chunk; what it
answers has no meaning, what it costs has. Without --model it is one of random weights with two of M3's sparse
layers (heads of 128, blocks of 128, 16 selected) and one GQA group of 16 heads: with the shipped model's
heads of 32 in groups of two and its full first layer a million tokens are a matter of hours on two cores.

Every chunk's seconds are kept, the file is written again every few chunks, so whatever stops the run leaves
what was measured. Afterwards: the decode rate behind the prompt, the time to the first token of the same
prompt from the prefix cache, and the highest memory.

Seconds per token are fitted with a + b * position. What attention must compute grows with the position in two
places: full attention of the first layer (4 * heads * head_dim FLOPs for each key) and the index scan of the
sparse layers (2 * groups * index_dim each); both lines are in the file, as FLOPs, and b over them is the rate
at which the machine did them.
"""

import argparse
import itertools
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from longforge.bench.clock import matmul_rate
from longforge.bench.inputs import DTYPES
from longforge.bench.serve_ours import random_prompts
from longforge.engine import Engine
from longforge.engine.request import GenerationRequest, RequestFailed
from longforge.kernels.host_memory import keep_freed_memory
from longforge.model import CausalLM, KVCache, LayerSpec, ModelConfig
from longforge.model.presets import PRESETS
from longforge.observe import passport, write_json_atomic
from longforge.protocol import SamplingParams
from longforge.server.launch import model_folder

RESULTS = Path(__file__).parent / "results"
WRITE_EVERY = 16
"""Chunks."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    model = _model(options)
    made_for = model.config.max_positions
    room = options.tokens + options.decode + model.config.block_size
    model.config = replace(model.config, max_positions=max(room, made_for))
    pages = -(-room // model.config.block_size) + 1
    engine = Engine(model, pages=pages, max_running=1, max_batch_tokens=options.chunk)
    engine.warm_up()
    result: dict[str, Any] = {
        "command": f".venv/bin/python benchmarks/million_tokens.py {' '.join(sys.argv[1:])}".strip(),
        "passport": passport(),
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "tokens": options.tokens,
        "chunk": options.chunk,
        "model_context": made_for,
        "pool_bytes": KVCache(model.config, 1, "meta", model.dtype).bytes * pages,
        "flops_per_token_and_position": _flops(model.config),
        "matmul_flops_per_second": matmul_rate(torch.device("cpu"), model.dtype),
        "finished": False,
        "chunks": [],
    }
    [prompt] = random_prompts(model, 1, options.tokens, seed=0)
    if _prefill(engine, prompt, options, result):
        result["hit"] = _hit(engine, prompt)
        result["finished"] = True
    _write(result, options.out)
    print(f"wrote {options.out}.json and {options.out.name}.png: {_summary(result)}")


def _model(options: argparse.Namespace) -> CausalLM:
    """The asked one, or one with layers of M3's shape and random weights."""
    if options.model is not None:
        return CausalLM.from_pretrained(model_folder(options.model), DTYPES[options.dtype])
    sparse = LayerSpec("sparse", "moe")
    shape = replace(
        PRESETS["micro"],
        layers=(sparse, sparse),
        hidden_size=256,
        heads=16,
        kv_heads=1,
        head_dim=128,
        rotary_dim=64,
        index_dim=128,
        block_size=128,
        top_k_blocks=16,
        mtp_modules=0,
    )
    torch.manual_seed(0)
    return CausalLM(shape).to(DTYPES[options.dtype])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="model folder (default: two of M3's layers)")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=2048, help="most tokens of one step")
    parser.add_argument("--decode", type=int, default=64, help="tokens generated behind the prompt")
    parser.add_argument("--minutes", type=float, help="begin no new chunk after this long")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "million-tokens", help="without a suffix")
    return parser.parse_args()


def _flops(config: ModelConfig) -> dict[str, int]:
    """Of one token for each position before it: full attention, and index scores; all layers together."""
    full = sum(layer.mixer == "full" for layer in config.layers)
    sparse = sum(layer.mixer == "sparse" for layer in config.layers)
    return {
        "full_attention": full * 4 * config.heads * config.head_dim,
        "index_scan": sparse * 2 * config.kv_heads * config.index_dim,
    }


def _prefill(
    engine: Engine, prompt: Sequence[int], options: argparse.Namespace, result: dict[str, Any]
) -> bool:
    """Steps through the prompt and the answer behind it. False where the time was up before the end."""
    params = SamplingParams(max_tokens=options.decode, temperature=0.0)
    begun = time.perf_counter()
    engine.submit(GenerationRequest("cold", tuple(prompt), params))
    chunks, times = result["chunks"], []
    while engine.has_work:
        if options.minutes is not None and time.perf_counter() - begun > 60 * options.minutes and not times:
            engine.cancel("cold")
            print("the time is up", file=sys.stderr)
            return False
        before, at = engine.stats().prompt_tokens, time.perf_counter()
        events = engine.step()
        now = time.perf_counter()
        assert not any(isinstance(event, RequestFailed) for event in events), "greedy answers do not fail"
        times += [now] * len(events)
        computed = engine.stats().prompt_tokens
        if computed > before:
            chunks.append({"position": before, "tokens": computed - before, "seconds": now - at})
            _progress(chunks, len(prompt), now - begun)
            if len(chunks) % WRITE_EVERY == 0:
                _write(result, options.out)
        if len(times) == 1 and "first_token_seconds" not in result:
            result["first_token_seconds"] = now - begun
    gaps = sorted(b - a for a, b in itertools.pairwise(times))
    result["decode_tokens_per_second"] = (len(times) - 1) / (times[-1] - times[0])
    result["decode_ms"] = {
        name: 1e3 * gaps[int(share * (len(gaps) - 1))]
        for name, share in (("low", 0.25), ("median", 0.5), ("high", 0.75))
    }
    return True


def _hit(engine: Engine, prompt: Sequence[int], times: int = 3) -> dict[str, Any]:
    """Milliseconds until the first token of the same prompt, and how much of it the cache had."""
    taken, cached = [], 0
    for number in range(times):
        begun = time.perf_counter()
        params = SamplingParams(max_tokens=1, temperature=0.0)
        engine.submit(GenerationRequest(f"hit-{number}", tuple(prompt), params))
        events = []
        while not events:
            events = engine.step()
        taken.append(1e3 * (time.perf_counter() - begun))
        [event] = events
        assert not isinstance(event, RequestFailed), "greedy answers do not fail"
        cached = event.cached_tokens
    return {"first_token_ms": sorted(taken), "cached_tokens": cached}


def _progress(chunks: Sequence[dict[str, Any]], tokens: int, seconds: float) -> None:
    last = chunks[-1]
    done = last["position"] + last["tokens"]
    left = ""
    if len(chunks) > 3:
        fit = _fit(chunks)
        rest = _seconds_to(fit, tokens) - _seconds_to(fit, done)
        left = f", about {max(0.0, rest) / 60:.0f} min left"
    rate = last["tokens"] / last["seconds"]
    print(
        f"\r{done:,} of {tokens:,} tokens, {seconds / 60:.1f} min, now {rate:,.0f} tokens/s{left}      ",
        end="" if done < tokens else "\n",
        file=sys.stderr,
        flush=True,
    )


def _fit(chunks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds per token as a + b * position (the middle of a chunk), least squares of relative errors.

    The first chunk is left out: what is allocated the first time is in it.
    """
    used = chunks[1:]
    x = np.array([chunk["position"] + (chunk["tokens"] - 1) / 2 for chunk in used])
    y = np.array([chunk["seconds"] / chunk["tokens"] for chunk in used])
    design = np.stack([np.ones_like(x), x], 1) / y[:, None]
    (a, b), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    errors = np.abs(a + b * x - y) / y
    return {"a": float(a), "b": float(b), "median_relative_error": float(np.median(errors))}


def _seconds_to(fit: dict[str, float], position: int) -> float:
    """Seconds of a whole prefill of so many tokens, by the fit."""
    return fit["a"] * position + fit["b"] * position**2 / 2


def _write(result: dict[str, Any], out: Path) -> None:
    result["peak_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if len(result["chunks"]) > 3:
        result["fit"] = _fit(result["chunks"])
        flops = sum(result["flops_per_token_and_position"].values())
        result["fit"]["flops_per_second"] = flops / result["fit"]["b"] if result["fit"]["b"] > 0 else None
    write_json_atomic(out.with_name(out.name + ".json"), result)
    if len(result["chunks"]) > 3:
        _plot(result, out.with_name(out.name + ".png"))


def _plot(result: dict[str, Any], path: Path) -> None:
    """Microseconds per token by position, the fit, and the limit: attention alone at the rate of products."""
    chunks, fit = result["chunks"], result["fit"]
    x = np.array([chunk["position"] + (chunk["tokens"] - 1) / 2 for chunk in chunks])
    y = np.array([1e6 * chunk["seconds"] / chunk["tokens"] for chunk in chunks])
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(x, y, ".", markersize=3, color="#6fa8dc", label="measured, a chunk each")
    ends = np.array([0.0, x[-1]])
    axis.plot(ends, 1e6 * (fit["a"] + fit["b"] * ends), color="#0b5394", label=_fit_text(fit))
    rate, bottom = result["matmul_flops_per_second"], np.zeros(2)
    names = {"full_attention": "full attention", "index_scan": "scores of index keys"}
    for (key, flops), colour in zip(
        result["flops_per_token_and_position"].items(), ("#f6b26b", "#ffe0b8"), strict=True
    ):
        if not flops:
            continue
        top = bottom + 1e6 * flops * ends / rate
        label = f"limit: {names[key]} at {rate / 1e9:.0f} GFLOP/s"
        axis.fill_between(ends, bottom, top, color=colour, linewidth=0, label=label)
        bottom = top
    axis.set(xlabel="position, tokens", ylabel="microseconds per token", xlim=(0, None), ylim=(0, None))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}K")
    axis.set_title(
        f"{result['passport']['device']}, {result['threads']} threads, {result['dtype']}", fontsize=10
    )
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=110)
    partial.replace(path)


def _fit_text(fit: dict[str, float]) -> str:
    return f"fit: {1e6 * fit['a']:.0f} us + {1e9 * fit['b']:.3g} us per 1,000 positions"


def _summary(result: dict[str, Any]) -> str:
    done = sum(chunk["tokens"] for chunk in result["chunks"])
    told = [f"{done:,} tokens", f"peak memory {result['peak_memory_bytes'] / 2**30:.1f} GiB"]
    if result["finished"]:
        hit = result["hit"]["first_token_ms"][1]
        told += [
            f"first token after {result['first_token_seconds']:.0f} s",
            f"{result['decode_tokens_per_second']:.0f} tokens/s behind it",
            f"first token of the same prompt again {hit:.0f} ms",
        ]
    return ", ".join(told)


if __name__ == "__main__":
    main()
