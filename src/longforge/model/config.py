"""What a model is made of: one frozen description from which everything else follows.

Legend of shapes used in this room (with the one of `kernels.layout`):

    d  hidden size      V  vocabulary      L  layers      E  experts      I  inner size of one expert
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from longforge.errors import ConfigError

__all__ = ["Activation", "Family", "FeedForward", "LayerSpec", "Mixer", "ModelConfig", "QKNorm"]

Family = Literal["m2", "m3"]
Mixer = Literal["full", "sliding", "lightning", "sparse"]
FeedForward = Literal["dense", "moe"]
QKNorm = Literal["per_layer", "per_head"]
Activation = Literal["silu", "swiglu_oai"]

# The sizes that a mixer or feed-forward needs, and nothing else reads.
_SIZES_OF = {
    "moe": ("experts", "experts_per_token", "expert_size"),
    "dense": ("dense_size",),
    "sparse": ("top_k_blocks", "index_dim"),
    "sliding": ("window",),
}


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: what mixes tokens, and what follows."""

    mixer: Mixer
    feed_forward: FeedForward

    def __post_init__(self) -> None:
        _one_of("mixer", self.mixer, get_args(Mixer))
        _one_of("feed_forward", self.feed_forward, get_args(FeedForward))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the M2 or M3 family. Raises ConfigError where the values do not make a model.

    A size that no layer uses becomes 0, so that equal models have equal configurations.
    """

    family: Family
    """Whose checkpoint names and config.json are read and written."""
    layers: tuple[LayerSpec, ...]
    vocab_size: int
    hidden_size: int
    heads: int
    kv_heads: int
    """GQA groups; also the number of index heads, one per group (MSA, arXiv 2606.13392, section 3.1)."""
    head_dim: int
    rotary_dim: int
    """The first `rotary_dim` channels of each head are rotated, the others pass."""
    rope_theta: float
    qk_norm: QKNorm | None
    """per_layer: one RMSNorm over the whole flattened q (and k). per_head: one over each head's channels."""
    gemma_norm: bool
    """RMSNorm multiplies by 1 + w (w starts at 0) instead of w (starts at 1)."""
    activation: Activation
    max_positions: int
    block_size: int
    """Positions of a page; the selection block of sparse layers."""
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    """Inner size of the expert that every token passes; 0 = none."""
    routed_scale: float = 1.0
    """Multiplies the routed sum, not the shared expert."""
    dense_size: int = 0
    """Inner size of dense feed-forwards."""
    top_k_blocks: int = 0
    """Blocks that a query of a sparse layer attends to, its own included."""
    index_dim: int = 0
    window: int = 0
    """Positions that a sliding layer sees, the query's own included."""
    mtp_modules: int = 0
    """Multi-token prediction modules held as weights."""
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_id: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        _one_of("family", self.family, get_args(Family))
        _one_of("activation", self.activation, get_args(Activation))
        _one_of("qk_norm", self.qk_norm, (*get_args(QKNorm), None))
        if not self.layers:
            raise ConfigError("layers: at least one layer is needed, got none")
        sizes = ["vocab_size", "hidden_size", "heads", "kv_heads", "head_dim", "max_positions", "block_size"]
        for kind, names in _SIZES_OF.items():
            if self.has(kind):
                sizes += names
            else:
                for name in names:
                    object.__setattr__(self, name, 0)
        if not self.has("moe"):
            object.__setattr__(self, "shared_expert_size", 0)
            object.__setattr__(self, "routed_scale", 1.0)
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: a positive whole number is needed, got {value}")
        for name in ("shared_expert_size", "mtp_modules"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}: zero or more is needed, got {value}")
        self._check_relations()

    def _check_relations(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads: a multiple of kv_heads {self.kv_heads} is needed, got {self.heads}")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ConfigError(
                f"rotary_dim: an even number up to head_dim {self.head_dim} is needed, got {self.rotary_dim}"
            )
        if self.has("sparse") and self.index_dim < self.rotary_dim:
            raise ConfigError(
                f"index_dim: at least rotary_dim {self.rotary_dim} is needed, got {self.index_dim}"
            )
        if self.has("moe") and self.experts_per_token > self.experts:
            raise ConfigError(
                f"experts_per_token: at most experts {self.experts} is needed, got {self.experts_per_token}"
            )

    @property
    def index_heads(self) -> int:
        """One index query head per GQA group."""
        return self.kv_heads

    @property
    def norm_start(self) -> float:
        """The value at which RMSNorm weights start, where the norm multiplies by one."""
        return 0.0 if self.gemma_norm else 1.0

    @property
    def mtp_spec(self) -> LayerSpec:
        """The transformer block inside an MTP module: the kind of the last layer."""
        return self.layers[-1]

    def has(self, kind: str) -> bool:
        """Whether some layer has this mixer or feed-forward."""
        return any(kind in (layer.mixer, layer.feed_forward) for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a report or a run folder."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        return plain | {"layers": [[layer.mixer, layer.feed_forward] for layer in self.layers]}


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(str(a) for a in allowed)
        raise ConfigError(f"{name}: one of {listed} is needed, got {value}")
