"""Decoding on a GPU with CUDA graphs and without: tokens per second, for micro and a layer of M3.

PYTHONPATH=src python benchmarks/engine_gpu.py --out runs/gpu/engine.json [--seconds 110]

Each line is one engine with so many requests at once; steps are timed one by one. What has no time left is
left out and named in the file. `--model micro --device cpu --seconds 20` tries the script itself.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from longforge.engine import Engine, GenerationRequest
from longforge.engine.draft_length import DraftCosts
from longforge.model import CausalLM, LayerSpec, shipped
from longforge.model.presets import PRESETS
from longforge.protocol import SamplingParams

PROMPT = 300
STEPS = 64
BATCHES = {"micro": (1, 8, 64), "m3-layer": (1, 16)}
FREE = DraftCosts(rows=(1,), step=(1.0,), draft=(0.0,))
"""As many drafts as allowed are always made."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding with CUDA graphs and without.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=110.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=list(BATCHES), action="append")
    asked = parser.parse_args()
    end = time.monotonic() + asked.seconds
    report: dict[str, Any] = {"torch": torch.__version__, "device": _device(asked.device), "left_out": []}
    report["runs"] = lines = list[dict[str, Any]]()
    for name in asked.model or BATCHES:
        model = _model(name, asked.device)
        for case in _cases(name):
            if time.monotonic() > end - 10:
                report["left_out"].append(case)
                continue
            lines.append(case | _measure(model, case))
            print(_line(lines[-1]), flush=True)
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(report, indent=1) + "\n")
    asked.out.write_text(json.dumps(report, indent=1) + "\n")


def _device(name: str) -> str:
    return torch.cuda.get_device_name() if name == "cuda" else name


def _model(name: str, device: str) -> CausalLM:
    if name == "micro":
        return CausalLM.from_pretrained(shipped.path(), dtype=torch.bfloat16, device=device)
    config = replace(PRESETS["m3"], layers=(LayerSpec("sparse", "moe"),), max_positions=8192)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # in fp32 the weights would take twice the memory for a moment
    try:
        with torch.device(device):
            return CausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _cases(name: str) -> Iterator[dict[str, Any]]:
    for batch in BATCHES[name]:
        for drafts in (0, 2) if name == "micro" else (0,):
            for graphs in (True, False):
                yield {"model": name, "requests": batch, "drafts": drafts, "cuda_graphs": graphs}


def _measure(model: CausalLM, case: dict[str, Any]) -> dict[str, Any]:
    requests, tokens = case["requests"], STEPS * (1 + case["drafts"]) + 16
    size = model.config.block_size
    engine = Engine(
        model,
        pages=requests * (-(-(PROMPT + tokens) // size) + 1),
        max_running=requests,
        max_batch_tokens=max(2048, requests),
        prefix_cache=False,
        drafts=case["drafts"],
        draft_costs=FREE,
        cuda_graphs=case["cuda_graphs"],
    )
    params = SamplingParams(max_tokens=tokens, temperature=1.0)
    for request in range(requests):
        prompt = tuple((7 * request + 3 * place) % 1000 + 300 for place in range(PROMPT))
        engine.submit(GenerationRequest(str(request), prompt, replace(params, seed=request)))
    while engine.stats().generated_tokens < 4 * requests:  # prompts, compilation, captures
        engine.step()
    before, seconds = engine.stats(), list[float]()
    while len(seconds) < STEPS and engine.stats().running == requests:
        begun = time.perf_counter()
        engine.step()  # which ends with the tokens on the host
        seconds.append(time.perf_counter() - begun)
    generated = engine.stats().generated_tokens - before.generated_tokens
    # Some steps capture another graph or compile: the median is what the others take.
    step = median(seconds)
    return {
        "step_ms": round(1e3 * step, 4),
        "slowest_step_ms": round(1e3 * max(seconds), 3),
        "tokens_per_step": round(generated / len(seconds), 3),
        "tokens_per_second": round(generated / len(seconds) / step, 1),
        "steps": len(seconds),
    }


def _line(run: dict[str, Any]) -> str:
    how = "graphs" if run["cuda_graphs"] else "eager"
    return (
        f"{run['model']:9} {run['requests']:3} requests, {run['drafts']} drafts, {how:6}: "
        f"{run['step_ms']:9.3f} ms a step, {run['tokens_per_second']:9.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
