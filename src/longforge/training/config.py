"""What a pretraining run is told: frozen dataclasses inside, TOML and pydantic at the border."""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from longforge.errors import ConfigError

__all__ = ["DataConfig", "OptimiserConfig", "PretrainConfig", "ScheduleConfig", "load_config"]

_STRICT = ConfigDict(extra="forbid")
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from. A path left empty is not used."""

    __pydantic_config__ = _STRICT

    conversations: str = ""
    """JSONL file: one object with `messages` (chat form, `reasoning_content` kept) and `tools` a line."""
    held_out: str = ""
    """The same, for the teacher-forced scores during training."""
    texts: str = ""
    """Folder; the `*.py`, `*.md`, `*.rst` and `*.txt` files below it are read as plain text."""
    tokenizer: str = ""
    """Folder or file of a tokenizer; empty: one is trained on the data."""
    text_share: Share = 0.1
    """Share of samples drawn from `texts`."""
    text_tokens: Count = 256
    text_weight: NotNegative = 0.1
    openings: Share = 0.0
    """Share of the conversations that end after the assistant's first turn."""
    background_weight: NotNegative = 0.1
    """Loss weight of tokens in a conversation that the assistant did not write."""
    background_rows: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the light rows whose logits are computed (their weight is raised to make up for it)."""
    tokens_per_step: Count = 4608
    max_tokens: Count = 2048


@dataclass(frozen=True)
class OptimiserConfig:
    """Rates are peaks; see `ScheduleConfig` for their course."""

    __pydantic_config__ = _STRICT

    matrices: Literal["adamw", "muon"] = "adamw"
    """What updates the layers' matrices; everything else goes by AdamW."""
    lr: NotNegative = 2e-3
    index_lr: NotNegative = 2e-3
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: NotNegative = 0.01
    clip: Positive = 1.0
    bias_rate: NotNegative = 1e-3
    """Step of the experts' selection bias (sign rule), in units of the router's sigmoid."""
    bf16: bool = True
    """Matrix products under bf16 autocast; weights and optimiser stay fp32."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Shares are of the planned steps."""

    __pydantic_config__ = _STRICT

    steps: Count = 2000
    minutes: NotNegative = 60.0
    """Time limit. When `steps` would overrun it, fewer are planned and the schedule is squeezed into them."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    dense_share: Share = 0.25
    """First part: both branches attend densely, and the index learns over the whole prefix."""
    index_weight: NotNegative = 1.0
    """Coefficient of the index loss (sum over layers)."""
    mtp_share: Share = 0.2
    """Last part, in which the multi-token prediction modules are trained."""
    mtp_detached_share: Share = 0.5
    """First part of that part: the modules learn alone, no gradient reaches the main model."""
    mtp_weight: tuple[NotNegative, NotNegative] = (0.3, 0.1)
    """Weight of their loss over the joint part, first and last (M2 report, section 2.3)."""
    log_every: Count = 10
    evaluate_every: Count = 100
    checkpoint_minutes: NotNegative = 3.0


@dataclass(frozen=True)
class PretrainConfig:
    __pydantic_config__ = _STRICT

    model: str = "micro"
    """Name of a preset."""
    vocab_size: Count | None = None
    """Overrides the preset's vocabulary."""
    tie_while_training: bool = False
    """Output head and embedding table are one while training; the checkpoint holds each."""
    seed: int = 20
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def with_schedule(self, **changes: Any) -> "PretrainConfig":
        """The same run with other steps, minutes and so on; None keeps a value."""
        kept = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self, schedule=dataclasses.replace(self.schedule, **kept))


def load_config(path: Path) -> PretrainConfig:
    """Reads and checks a TOML file; unknown keys are errors. Paths in [data] are relative to the file."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a TOML file, found none") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a TOML file, got {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    try:
        config = TypeAdapter(PretrainConfig).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {place}: {first['msg'].lower()}, got {first['input']!r}") from None
    places = {
        name: str((path.parent / value).resolve()) if value else ""
        for name in ("conversations", "held_out", "texts", "tokenizer")
        for value in [getattr(config.data, name)]
    }
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **places))
