"""POST /admin/weights: new weights from a folder into the running engine.

For processes on the same machine only.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor

from longforge.errors import CheckpointError, EngineError
from longforge.model import CausalLM, ModelConfig
from longforge.server.service import Service, error_reply
from longforge.server.wire import WeightsRequest

__all__ = ["admin_router", "load_state"]

LOOPBACK = frozenset({"127.0.0.1", "::1", "::ffff:127.0.0.1"})


def admin_router(service: Service) -> APIRouter:
    """The endpoint. It answers when the new weights are active, or with what is wrong and nothing changed."""
    router = APIRouter()
    one_at_a_time = asyncio.Lock()

    @router.post("/admin/weights", response_model=None)
    async def weights(body: WeightsRequest, request: Request) -> Response:
        if request.client is None or request.client.host not in LOOPBACK:
            message = "/admin/weights: answers only requests from this machine"
            return error_reply(403, message, "permission_error")
        async with one_at_a_time:
            state = await asyncio.to_thread(load_state, Path(body.path), service.loop.engine.config)
            try:
                await service.loop.swap_weights(state, body.version)
            except EngineError as error:
                status = 503 if service.loop.failure else 409
                return error_reply(status, str(error), "conflict_error", param="version")
        return JSONResponse({"version": service.loop.engine.version})

    return router


def load_state(folder: Path, config: ModelConfig) -> Mapping[str, Tensor]:
    """All weights of a model folder. CheckpointError unless it holds a model of this configuration."""
    model = CausalLM.from_pretrained(folder)
    # A server may have been told another context than the weights were made for.
    if replace(model.config, max_positions=config.max_positions) != config:
        raise CheckpointError(f"{folder}: expected the configuration of the served model, got another one")
    return model.state_dict()
