"""The one family of errors.

    LongforgeError            anything we raise on purpose; the command prints one line and exits 2
    ├── ConfigError           a configuration value or key
    ├── CheckpointError       a model folder: missing, truncated, wrong shape, unknown architecture
    ├── InputError            an argument of a public function or a command
    │   └── ContextOverflow   a prompt that does not fit the model's context
    ├── CheckError            a benchmark's own check failed: it reports nothing
    ├── EngineError           the engine cannot do what was asked in its present state
    │   └── Overloaded        more requests or tokens are waiting than it accepts; try again later
    ├── ToolError             a tool call of the agent that was refused (path outside the tree, bad range)
    └── RunError              a run folder: in use, not a run, not resumable

A message is one line: the thing, what was expected, what came, what to do.
"""

__all__ = [
    "CheckError",
    "CheckpointError",
    "ConfigError",
    "ContextOverflow",
    "EngineError",
    "InputError",
    "LongforgeError",
    "Overloaded",
    "RunError",
    "ToolError",
]


class LongforgeError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(LongforgeError):
    """A configuration key or value is wrong."""


class CheckpointError(LongforgeError):
    """A model folder cannot be read or written."""


class InputError(LongforgeError):
    """An argument is outside what the function or command accepts."""


class ContextOverflow(InputError):
    """A prompt (plus what it asks to generate) is longer than the model's context."""

    def __init__(self, prompt_tokens: int, context: int, *, at_least: bool = False) -> None:
        """at_least: the tokens were not counted, there are so many or more."""
        self.prompt_tokens = prompt_tokens
        self.context = context
        got = f"at least {prompt_tokens}" if at_least else str(prompt_tokens)
        super().__init__(
            f"prompt: at most {context} tokens fit the context, got {got}; shorten the conversation"
        )


class CheckError(LongforgeError):
    """What a benchmark would measure differs from the reference."""


class EngineError(LongforgeError):
    """The engine cannot do what was asked in its present state."""


class Overloaded(EngineError):
    """More requests or tokens are waiting than the engine accepts; the same request may succeed later."""


class ToolError(LongforgeError):
    """A tool call of an agent was refused."""


class RunError(LongforgeError):
    """A run folder is in use, is not a run, or cannot be resumed."""
