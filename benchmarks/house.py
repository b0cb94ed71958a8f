"""The figures of the house: presets, and parity with transformers.

    .venv/bin/python benchmarks/house.py            writes benchmarks/results/house.json

Parity: largest absolute difference of fp32 logits on random small checkpoints, over seeds, full forward.
"""

import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from longforge.model import CausalLM
from longforge.model.info import find_config, model_info
from longforge.observe import passport, write_json_atomic

RESULTS = Path(__file__).parent / "results"
SEEDS = range(5)
TOKENS = 160  # far more than the 3 blocks of 4 positions that a query selects

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 5,
    "num_experts_per_tok": 2, "rotary_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPARSE = {
    "partial_rotary_factor": 0.5, "dense_intermediate_size": 40, "shared_intermediate_size": 12,
    "moe_layer_freq": [0, 1, 1],
    "sparse_attention_config": {
        "sparse_num_index_heads": 2, "sparse_index_dim": 16, "sparse_block_size": 4, "sparse_topk_blocks": 3,
        "sparse_local_block": 1, "sparse_init_block": 0, "sparse_attention_freq": [0, 1, 1],
    },
}  # fmt: skip


def peer(family: str, seed: int) -> torch.nn.Module:
    """A random transformers model of a family."""
    torch.manual_seed(seed)
    if family == "m2":
        return transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**SMALL)).eval()
    config = transformers.MiniMaxM3VLTextConfig(**SMALL, **SPARSE)
    return transformers.MiniMaxM3VLForCausalLM(config).eval()


@torch.no_grad()
def parity(family: str) -> dict[str, float]:
    """Largest |difference| of logits per seed, as median, lowest and highest."""
    gaps = []
    for seed in SEEDS:
        theirs = peer(family, seed)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = CausalLM.from_pretrained(folder)
        ids = torch.randint(0, 61, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
        gaps.append(float((ours(ids) - theirs(input_ids=ids).logits).abs().max()))
    return {"median": statistics.median(gaps), "lowest": min(gaps), "highest": max(gaps), "seeds": len(gaps)}


def main() -> None:
    result = {
        "command": ".venv/bin/python benchmarks/house.py",
        "passport": passport(),
        "info": {name: model_info(find_config(name)) for name in ("m2", "m3", "micro", "mini")},
        "parity_with_transformers": {
            "version": transformers.__version__,
            **{family: parity(family) for family in ("m2", "m3")},
        },
    }
    write_json_atomic(RESULTS / "house.json", result)
    print(f"wrote {RESULTS / 'house.json'}")


if __name__ == "__main__":
    main()
