"""The engine: pages, scheduler, sampler, runner. Continuous batching of one model in one thread."""

from longforge.engine.engine import Engine
from longforge.engine.request import EngineStats, GenerationRequest, PromptToken, RequestFailed, TokenEvent

__all__ = ["Engine", "EngineStats", "GenerationRequest", "PromptToken", "RequestFailed", "TokenEvent"]
