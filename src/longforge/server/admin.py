"""Operators' endpoints: new weights, pause and resume, an empty cache. For the holder of the admin key; on a
server without keys, for processes on the same machine."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor

from longforge.errors import CheckpointError, EngineError
from longforge.model import CausalLM, ModelConfig
from longforge.server.service import Service, caller_of, error_reply
from longforge.server.wire import WeightsRequest

__all__ = ["admin_router", "load_state"]


def only_admin(request: Request) -> None:
    """HTTPException 403 unless the caller may change the server's state."""
    if not caller_of(request).admin:
        raise HTTPException(
            403, "needs the key named 'admin', or on a server without keys a request from this machine"
        )


def admin_router(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter(dependencies=[Depends(only_admin)])
    loop = service.loop
    one_at_a_time = asyncio.Lock()

    @router.post("/admin/weights", response_model=None)
    async def weights(body: WeightsRequest) -> Response:
        """Answers when the new weights are active, or with what is wrong and nothing changed."""
        async with one_at_a_time:
            state = await asyncio.to_thread(load_state, Path(body.path), loop.engine.config)
            try:
                await loop.swap_weights(state, body.version)
            except EngineError as error:
                status = 503 if loop.failure else 409
                return error_reply(status, str(error), "conflict_error", param="version")
        return JSONResponse({"version": loop.engine.version})

    @router.post("/pause")
    async def pause(mode: Literal["keep", "abort"] = "keep") -> dict[str, bool]:
        """Computes nothing until /resume; open requests wait (keep) or end with an error (abort)."""
        loop.pause()
        if mode == "abort":
            await loop.abort()
        return {"is_paused": loop.paused}

    @router.post("/resume")
    async def resume() -> dict[str, bool]:
        loop.resume()
        return {"is_paused": loop.paused}

    @router.get("/is_paused")
    async def is_paused() -> dict[str, bool]:
        return {"is_paused": loop.paused}

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> dict[str, int]:
        """Forgets all cached pages; who uses some keeps them to itself. Slower tiers keep theirs."""
        return {"pages": await loop.reset_cache()}

    return router


def load_state(folder: Path, config: ModelConfig) -> Mapping[str, Tensor]:
    """All weights of a model folder. CheckpointError unless it holds a model of this configuration."""
    model = CausalLM.from_pretrained(folder)
    if model.config != config:
        raise CheckpointError(f"{folder}: expected the configuration of the served model, got another one")
    return model.state_dict()
