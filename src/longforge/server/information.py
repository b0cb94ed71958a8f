"""What a server tells about itself: health, readiness, version, models, metrics."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from longforge import __version__
from longforge.server.metrics import Metrics
from longforge.server.service import Service, caller_of, model_check

__all__ = ["information_router"]


def information_router(service: Service, metrics: Metrics) -> APIRouter:
    """The endpoints."""
    router = APIRouter()
    loop = service.loop
    card = {
        "id": service.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "longforge",
        "max_model_len": loop.engine.context,
    }

    @router.get("/health", response_model=None)
    async def health(request: Request) -> Response:
        """Whether process and engine live; to whoever may ask, what the engine counts as well."""
        failure = loop.failure
        status = {"status": "ok" if failure is None else str(failure), "model": service.model_name}
        counts = asdict(loop.stats()) if caller_of(request).known else {}
        return JSONResponse({**status, **counts}, 200 if failure is None else 503)

    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether new requests are taken: 503 while the server is draining or its engine has failed."""
        reason = str(loop.failure) if loop.failure else "draining" if loop.draining else None
        return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{model:path}", response_model=None)
    async def model(model: str) -> Response:
        return model_check(service, model) or JSONResponse(card)

    @router.get("/metrics", response_model=None)
    def figures() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
