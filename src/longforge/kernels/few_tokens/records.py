"""What compiled code knows of a model: numpy records of sizes, addresses and places.

Addresses are those of the model's own tensors, so a step takes a few arrays instead of hundreds. Matrices are
row-major [out, in]; rows whose length is no multiple of sixteen are copied with zeros behind them.
Scales are places in one fp32 array: the factors of all norms, as the norms multiply (1 + w for Gemma's).
"""

import numpy as np

__all__ = ["DENSE", "FULL", "LAYER", "MODEL", "NORM_ALL", "NORM_HEADS", "NORM_NONE", "SLIDING", "SPARSE"]

FULL, SLIDING, SPARSE = 0, 1, 2
NORM_NONE, NORM_HEADS, NORM_ALL = 0, 1, 2
DENSE = 0
"""`experts` of a layer that has none."""

LAYER = np.dtype(
    [
        (name, np.int64)
        for name in (
            "number",  # among the layers
            "mixer",
            "window",  # positions a query sees; the greatest number where it sees all
            "sparse_number",  # which of the sparse layers, -1 for others
            "qkv",
            "index",
            "o",
            "k_cache",
            "v_cache",
            "index_cache",
            "experts",
            "router",  # fp32
            "bias",
            "gate_up",
            "down",
            "shared_size",  # of the shared expert, or of the dense feed-forward
            "shared_gate_up",
            "shared_down",
            "input_norm",
            "post_norm",
            "q_norm",
            "k_norm",
            "index_q_norm",
            "index_k_norm",
            # An MTP module's own:
            "eh_proj",
            "embed_norm",
            "hidden_norm",
            "final_norm",
        )
    ],
    align=True,
)
"""One layer; matrices are addresses, norms are places in the scales."""

MODEL = np.dtype(
    [
        (name, np.int64)
        for name in (
            "hidden",
            "vocab",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "half_rotary",
            "index_dim",
            "block_size",
            "top_k",
            "chosen",  # experts per token
            "expert_size",
            "widest",  # the widest inner size of a feed-forward
            "qk_norm",
            "embed",
            "head",
            "final_norm",
            "frequencies",  # place in the scales
            "tiles",  # 1 where the layers' matrices but routers lie in panels for matrix tiles
        )
    ]
    + [(name, np.float32) for name in ("eps", "scale", "alpha", "limit", "shift", "routed_scale")],
    align=True,
)
