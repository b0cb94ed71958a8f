"""MSA against dense attention where a prompt is short: one operation after the other, in turns, no gradients.

.venv/bin/python benchmarks/short_prompts.py

Prints milliseconds (medians) and their ratio for M3's layer in bf16 and for micro's in fp32 and bf16. A
model's sparse layer itself goes through dense attention on a CPU while all blocks are selected
(`model/attention.py`).
"""

import torch

from longforge.bench.clock import interleaved
from longforge.bench.inputs import make_inputs
from longforge.bench.work import Shape, Work
from longforge.kernels.dense_attention import dense_attention
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.sparse_attention import sparse_attention
from longforge.model.presets import PRESETS

LENGTHS = (64, 128, 256, 512, 1024, 2048)
_micro = PRESETS["micro"]
MICRO = Shape(
    _micro.heads,
    _micro.kv_heads,
    _micro.head_dim,
    _micro.index_dim,
    _micro.block_size,
    _micro.top_k_blocks,
)
LAYERS = {
    "m3 bf16": (Shape(), torch.bfloat16),
    "micro fp32": (MICRO, torch.float32),
    "micro bf16": (MICRO, torch.bfloat16),
}


@torch.no_grad()
def main() -> None:
    device = torch.device("cpu")
    print(f"{'layer':12} {'tokens':>6} {'msa ms':>8} {'dense ms':>8} {'ratio':>6}")
    for name, (shape, dtype) in LAYERS.items():
        for length in LENGTHS:
            i = make_inputs(shape, Work("prefill", length, length, 0), dtype, device)

            def msa(i=i, top_k=shape.top_k) -> object:
                blocks = select_blocks(i.index_q, i.index_k_pages, i.layout, top_k)
                return sparse_attention(i.q, i.k_pages, i.v_pages, blocks, i.layout)

            def dense(i=i) -> object:
                return dense_attention(i.q, i.k_pages, i.v_pages, i.layout)

            taken = interleaved({"msa": msa, "dense": dense}, device, 1.0)
            ours, theirs = taken["msa"].ms, taken["dense"].ms
            print(f"{name:12} {length:6} {ours:8.3f} {theirs:8.3f} {ours / theirs:6.2f}", flush=True)


if __name__ == "__main__":
    main()
