"""One folder per operation: `api` (public), `reference` (the specification), backends, `cases` (shapes).

The whole of MSA on a researcher's own tensors is here by name, loaded when first asked for: `msa_attention`,
the layer `MsaAttention`, and the `PackedLayout` that several calls can share.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longforge.kernels.layout import PackedLayout
    from longforge.kernels.msa import MsaOutput, msa_attention
    from longforge.kernels.msa_layer import MsaAttention

__all__ = ["MsaAttention", "MsaOutput", "PackedLayout", "msa_attention"]

_FILES = {"MsaAttention": "msa_layer", "MsaOutput": "msa", "PackedLayout": "layout", "msa_attention": "msa"}


def __getattr__(name: str) -> Any:
    """Importing this room loads no torch; using one of its names does."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
