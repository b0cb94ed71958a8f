"""What a run is told: TOML checked at the border, frozen dataclasses inside, and TOML again with the run."""

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from longforge.errors import ConfigError
from longforge.forge.scheduler import age_bound, window_size

__all__ = [
    "AgentConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "ForgeConfig",
    "RolloutConfig",
    "TrainerConfig",
    "dump_config",
    "load_config",
    "parse_config",
]

SHIPPED_MODEL = "demo"
DEFAULT_TREE = "stdlib"

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class EnvironmentConfig:
    """Where tasks and rewards come from."""

    __pydantic_config__ = _STRICT
    kind: Literal["code_search"] = "code_search"
    tree: str = DEFAULT_TREE
    """A Python tree to ask questions about: a folder, or `stdlib` for the running interpreter's library."""
    mix: dict[str, NotNegative] = field(default_factory=dict)
    """Share of each kind of question; empty: the environment's own mix."""


@dataclass(frozen=True)
class AgentConfig:
    """Who acts. The built-in agent of the environment, or any program."""

    __pydantic_config__ = _STRICT
    command: tuple[str, ...] = ()
    """Started once per episode with OPENAI_BASE_URL and OPENAI_API_KEY set and the task as JSON on standard
    input; its answer is the last line of its standard output, JSON with the key `answer`. Empty: the
    environment's own agent."""
    max_calls: Count = 6
    """Model calls per episode, for the environment's own agent."""
    deadline: Seconds = 60.0
    """Seconds per episode; after it the episode ends with reward 0."""
    concurrency: Count = 32
    """Episodes in flight."""


@dataclass(frozen=True)
class RolloutConfig:
    """How experience is made and queued."""

    __pydantic_config__ = _STRICT
    groups_per_step: Count = 8
    """P: groups that a training step takes."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """G: episodes per task."""
    buffer: Count = 16
    """B: groups submitted and not yet taken by the trainer."""
    window_fraction: Share = 0.3
    """The trainer may take completed groups among the W = max(1, floor(fraction * B)) oldest places."""
    max_tokens: Count = 192
    """Most tokens sampled per call. A call may ask for less."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """The policy that samples is the one that is trained. Recorded log-probabilities, and so the importance
    weights, are those of temperature 1, of which the engine reports them."""
    thinking: Literal["adaptive", "enabled", "disabled"] = "adaptive"
    allow_request_sampling: bool = False
    """Whether an agent's own temperature, top_p, top_k and thinking are followed. Otherwise the run's are,
    whatever the agent asks for: the policy under training decides how it samples, not its user."""

    @property
    def window(self) -> int:
        """W, in groups."""
        return window_size(self.buffer, self.window_fraction)

    @property
    def age_bound(self) -> int:
        """Most training steps between the submission of a group and its training."""
        return age_bound(self.buffer, self.window, self.groups_per_step)


@dataclass(frozen=True)
class TrainerConfig:
    """How experience changes the weights."""

    __pydantic_config__ = _STRICT
    steps: Count = 16
    learning_rate: Positive = 3e-4
    index_learning_rate: Positive | None = None
    """Of the index branch; that of the model if not given."""
    warmup_steps: Annotated[int, Field(ge=0)] = 1
    final_rate: Share = 1.0
    """Share of the learning rate that is left at the last step (linear decay)."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-12
    """Small on purpose: gradients of late RL are far below the usual 1e-8 (MiniMax-M1 uses 1e-15)."""
    weight_decay: NotNegative = 0.0
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    eps_high: NotNegative = 4.0
    """CISPO: importance weights are clipped at 1 + eps_high."""
    normalise_advantage: bool = False
    """Divide advantages by the group's standard deviation (GRPO's form)."""
    mean_over: Literal["batch", "group"] = "batch"
    """Token mean over the whole batch, or over each group with groups equal."""
    index_loss: NotNegative = 0.1
    """Coefficient of the index branch's own loss; 0 leaves the branch as it is."""
    mtp_loss: NotNegative = 0.0
    """Coefficient of multi-token prediction on the sampled tokens; its gradient stays in the MTP modules."""
    bias_rate: NotNegative = 1e-3
    """Step of the experts' selection bias (sign rule)."""
    bf16: bool = False
    """Matrix products under bf16 autocast; weights and optimiser stay fp32."""
    micro_batch_tokens: Count = 4096
    checkpoint_every: Count = 4
    threads: Count = 1


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out success, measured before and after."""

    __pydantic_config__ = _STRICT
    questions: Count = 200
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """0 is greedy."""


@dataclass(frozen=True)
class EngineConfig:
    """The server that samples."""

    __pydantic_config__ = _STRICT
    pages: Count | None = None
    """Pages of the KV cache; the server's own choice if not given."""
    max_running: Count = 64
    threads: Count = 1
    start_seconds: Seconds = 300.0
    """How long it may take until the server answers; the first start on a machine compiles kernels."""


@dataclass(frozen=True)
class ForgeConfig:
    """A run."""

    __pydantic_config__ = _STRICT
    name: str = "run"
    seed: int = 0
    model: str = SHIPPED_MODEL
    """A model folder, or `demo` for the model inside the package."""
    max_seconds: Seconds | None = None
    """Limit of the whole run; training stops early enough for the last evaluation to fit."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


def load_config(path: Path) -> ForgeConfig:
    """Reads and checks a TOML file. Relative folders in it are relative to the file.

    Errors: ConfigError naming the file, the key and what came.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"config {path}: expected a TOML file, found none") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path}: expected UTF-8 text") from None
    config = parse_config(text, str(path))
    tree = config.environment.tree
    model = config.model if config.model == SHIPPED_MODEL else _beside(path, config.model)
    tree = tree if tree == DEFAULT_TREE else _beside(path, tree)
    return replace(config, model=model, environment=replace(config.environment, tree=tree))


def parse_config(text: str, name: str = "config") -> ForgeConfig:
    """Checks TOML text. `name` stands in error messages."""
    try:
        raw = tomllib.loads(text)
        # Through JSON, so that strict types still let an array be a tuple.
        config = TypeAdapter(ForgeConfig).validate_json(json.dumps(raw))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from None
    except TypeError:
        raise ConfigError(
            f"{name}: expected strings, numbers, booleans and lists, got a date or time"
        ) from None
    except ValidationError as error:
        raise ConfigError(f"{name}: {_first_problem(error)}") from None
    rollout = config.rollout
    if rollout.buffer < rollout.groups_per_step:
        raise ConfigError(
            f"{name}: rollout.buffer: expected at least rollout.groups_per_step = {rollout.groups_per_step}, "
            f"got {rollout.buffer}"
        )
    return config


def dump_config(config: ForgeConfig) -> str:
    """The whole configuration as TOML that `parse_config` reads back to an equal one."""
    top, sections = [], []
    for key, value in asdict(config).items():
        if isinstance(value, Mapping):
            lines = [f"{k} = {_toml(v)}" for k, v in value.items() if v is not None]
            sections.append("\n".join([f"[{key}]", *lines]))
        elif value is not None:
            top.append(f"{key} = {_toml(value)}")
    return "\n\n".join(["\n".join(top), *sections]) + "\n"


def _beside(path: Path, folder: str) -> str:
    return str((path.parent / Path(folder).expanduser()).resolve())


def _toml(value: Any) -> str:
    """A value as TOML: JSON's spelling of strings, numbers and lists is valid TOML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "unexpected_keyword_argument":
        known = _keys_at(place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.0)
        return f"unknown key {key}; the nearest known one is {'.'.join([*place[:-1], *near])}"
    message = first["msg"].removeprefix("Input should be ")
    return f"{key}: expected {message}, got {json.dumps(first['input'], default=str)[:80]}"


def _keys_at(place: list[str]) -> list[str]:
    section: Any = ForgeConfig()
    for part in place:
        section = getattr(section, part)
    assert is_dataclass(section)
    return [f.name for f in fields(section)]
