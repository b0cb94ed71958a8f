"""Model folders: config.json and safetensors under the released names, read and written whole."""

import json
import logging
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from longforge.errors import CheckpointError, ConfigError
from longforge.model.causal_lm import CausalLM
from longforge.model.checkpoint_config import read_config, write_config
from longforge.model.checkpoint_names import Piece, parameter_pieces, style_of
from longforge.model.config import ModelConfig
from longforge.model.safetensors_files import INDEX, TensorFiles, read_json, write_tensors

__all__ = ["config_of", "declared_dtype", "load_model", "save_model"]

logger = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")
_MTP = re.compile(r"(?:^|\.)mtp\.(?:layers\.(\d+)\.)?")
# Kept in fp32 when a model is read in a narrower dtype: the router's scores and the head's logits are fp32.
_ALWAYS_WIDE = ("mlp.gate.weight", "e_score_correction_bias", "lm_head.weight")


def config_of(folder: str | Path) -> ModelConfig:
    """The configuration a model folder declares (its MTP modules may not be held). Reads no weights."""
    path = _folder(folder)
    try:
        return read_config(read_json(path / "config.json"))
    except ConfigError as error:
        raise ConfigError(f"{path / 'config.json'}: {error}") from error


def declared_dtype(folder: str | Path) -> torch.dtype:
    """The dtype that a model folder's config.json names; fp32 where it names none."""
    return _declared_dtype(read_json(_folder(folder) / "config.json"))


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> CausalLM:
    """A model from its folder, straight into `dtype` on `device`.

    dtype None: fp32 on a CPU, where narrower arithmetic is slower; elsewhere what config.json names.

    Router weights, the selection bias and the head stay fp32 in a narrower dtype. Of a multimodal checkpoint
    the text model is read, with a notice on the log. Raises CheckpointError or ConfigError with one line.
    """
    path = _folder(folder)
    config = config_of(path)
    raw = read_json(path / "config.json")
    files = TensorFiles(path, _quantised_block(raw))
    config = _with_held_mtp(config, files.names)
    _notice_not_text(path, files.names)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else _declared_dtype(raw)
    state = _read_state(config, files, dtype, device)
    with torch.device("meta"):
        model = CausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.source_config = raw
    return model


def save_model(
    model: CausalLM, folder: str | Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes a model folder under the released names; `dtype` narrows the weights (routers stay as they are).

    The folder appears whole: it is written beside its place and then renamed. An older folder there is moved
    away first; what it holds besides weights and configuration (a tokenizer, a card, folders) stays. Raises
    CheckpointError where it cannot be written.
    """
    target = Path(folder)
    if target.is_symlink():
        target = target.resolve()
    new = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.new"
    state = model.state_dict()
    name = str(dtype or model.dtype).removeprefix("torch.")
    try:
        new.mkdir(parents=True)
        tensors = (
            (p.name, _narrowed(p, state[p.key][p.index], dtype)) for p in parameter_pieces(model.config)
        )
        write_tensors(new, tensors, max_shard_bytes)
        config = write_config(model.config, model.source_config, name)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _replace(target, new)
    except (OSError, SafetensorError) as error:  # a full disk comes as the second where tensors are written
        raise CheckpointError(f"{target}: a folder that can be written is needed, got {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _read_state(
    config: ModelConfig, files: TensorFiles, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Our parameters in `dtype`, filled piece by piece."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in CausalLM(config).state_dict().items()}
    pieces = list(parameter_pieces(config, style_of(files.names)))
    _check_names(files, pieces, shapes)
    state: dict[str, Tensor] = {}
    for piece in pieces:
        value = files.read(piece.name)
        if piece.key not in state:
            kind = _dtype_of(piece.key, dtype)
            state[piece.key] = torch.empty(shapes[piece.key], dtype=kind, device=device)
        state[piece.key][piece.index].copy_(value)
    return state


def _check_names(files: TensorFiles, pieces: list[Piece], shapes: Mapping[str, torch.Size]) -> None:
    """Every tensor is there, has its shape, and no other tensor claims to be part of the text model."""
    for piece in pieces:
        if piece.name not in files.names:
            raise CheckpointError(f"{files.folder}: tensor {piece.name} is needed, and is missing")
        wanted = list(torch.empty(shapes[piece.key], device="meta")[piece.index].shape)
        if files.shape(piece.name) != wanted:
            got = files.shape(piece.name)
            raise CheckpointError(f"{files.folder}: {piece.name} of shape {wanted} is needed, got {got}")
    known = {piece.name for piece in pieces}
    ignored = (*_NOT_TEXT, "lm_head.weight", "language_model.lm_head.weight")
    for name in sorted(files.names - known):
        if not (name.startswith(ignored) or _MTP.search(name) or name.endswith(".inv_freq")):
            raise CheckpointError(f"{files.folder}: tensor {name} has no place in the model of config.json")


def _with_held_mtp(config: ModelConfig, names: set[str]) -> ModelConfig:
    found = {int(m.group(1)) for name in names if (m := _MTP.search(name)) and m.group(1)}
    held = 0
    while held in found:
        held += 1
    held = min(held, config.mtp_modules)
    if held != config.mtp_modules:
        logger.warning(
            "config.json declares %d multi-token prediction modules, the checkpoint holds %d: read as %d",
            config.mtp_modules,
            held,
            held,
        )
    return replace(config, mtp_modules=held)


def _notice_not_text(folder: Path, names: set[str]) -> None:
    count = sum(name.startswith(_NOT_TEXT) for name in names)
    if count:
        logger.warning(
            "%s: a multimodal checkpoint; the text model is read, %d other tensors are not", folder, count
        )


def _quantised_block(raw: Mapping[str, Any]) -> tuple[int, int]:
    text = raw.get("text_config") or {}
    quantisation = raw.get("quantization_config") or text.get("quantization_config") or {}
    if not isinstance(quantisation, Mapping):
        raise CheckpointError(
            f"config.json: quantization_config as an object is needed, got {quantisation!r}"
        )
    method = quantisation.get("quant_method", "fp8")
    if method != "fp8":
        raise CheckpointError(f"config.json: quant_method fp8 or none is needed, got {method}")
    match quantisation.get("weight_block_size") or [128, 128]:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case other:
            raise CheckpointError(f"config.json: weight_block_size [rows, columns] is needed, got {other!r}")


def _declared_dtype(raw: Mapping[str, Any]) -> torch.dtype:
    text = raw.get("text_config") or {}
    name = next((d[k] for d in (raw, text) for k in ("dtype", "torch_dtype") if d.get(k)), "float32")
    if name not in _DTYPES:
        raise CheckpointError(f"config.json: dtype {', '.join(_DTYPES)} is needed, got {name}")
    return _DTYPES[name]


def _dtype_of(key: str, dtype: torch.dtype) -> torch.dtype:
    wide = torch.promote_types(dtype, torch.float32)
    return wide if key.endswith(_ALWAYS_WIDE) else dtype


def _narrowed(piece: Piece, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or piece.key.endswith(("mlp.gate.weight", "e_score_correction_bias")):
        return tensor
    return tensor.to(dtype)


def _folder(folder: str | Path) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path}: a model folder is needed, and there is none")
    return path


def _replace(target: Path, new: Path) -> None:
    """Puts `new` at `target`; what an older folder holds besides weights and configuration comes along."""
    if not target.exists():
        new.rename(target)
        return
    for entry in target.iterdir():
        if entry.suffix == ".safetensors" or entry.name in (INDEX, "config.json"):
            continue
        if entry.is_symlink():
            (new / entry.name).symlink_to(entry.readlink())
        elif entry.is_dir():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name)
    old = target.parent / f"{new.name}.old"
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
