"""The response object: what was asked, how it stands, what came of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from longforge.errors import LongforgeError
from longforge.server.responses.events import new_id
from longforge.server.responses.wire import FunctionTool, NamedFunction, ResponsesRequest

__all__ = ["Reply", "Status", "usage_body"]

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


@dataclass
class Reply:
    """One response while it comes to be. `body` is its present state."""

    request: ResponsesRequest
    id: str = field(default_factory=lambda: new_id("resp"))
    created: int = field(default_factory=lambda: int(time.time()))
    status: Status = "in_progress"
    output: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    completed: int | None = None

    def end(self, *, cut: bool, usage: dict[str, Any]) -> None:
        """It ends as it should, or cut by a limit."""
        self.status = "incomplete" if cut else "completed"
        self.completed = None if cut else int(time.time())
        self.usage = usage

    def fail(self, error: LongforgeError) -> None:
        """It ends with an error; what came before stays."""
        self.status = "failed"
        self.error = {"code": "server_error", "message": str(error)}

    @property
    def body(self) -> dict[str, Any]:
        """The whole object. Fields that were not asked for say the default."""
        asked = self.request
        incomplete = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": self.completed,
            "status": self.status,
            "error": self.error,
            "incomplete_details": incomplete,
            "model": asked.model,
            "output": list(self.output),
            "usage": self.usage,
            **_echoed(asked),
        }


def _echoed(asked: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    choice = asked.tool_choice
    form = asked.text.format if asked.text and asked.text.format else None
    return {
        "instructions": asked.instructions,
        "previous_response_id": asked.previous_response_id,
        "tools": [_tool_body(tool) for tool in asked.tools or ()],
        "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "top_logprobs": 0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "text": {
            "format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"},
            "verbosity": "medium",
        },
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
        "truncation": "disabled",
        "store": asked.stored,
        "background": bool(asked.background),
        "service_tier": "default",
        "metadata": asked.metadata or {},
        "user": asked.user,
        "safety_identifier": asked.safety_identifier,
        "prompt_cache_key": asked.prompt_cache_key,
    }


def _tool_body(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.spec.parameters,
        "strict": False,
    }


def usage_body(prompt: Sequence[int], cached: int, completion: int, thinking: int) -> dict[str, Any]:
    """Tokens that a response took."""
    return {
        "input_tokens": len(prompt),
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": thinking},
        "total_tokens": len(prompt) + completion,
    }
