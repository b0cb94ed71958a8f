"""The rollout engine over HTTP: token ids in, token ids with log-probabilities and weights versions out.

Speaks the completions dialect with `return_token_ids` that this project's server and vLLM share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from longforge.errors import EngineError

__all__ = ["Completion", "EngineClient", "EngineGone", "healthy", "load_weights"]

REQUEST_SECONDS = 600.0
"""An answer may wait behind a full engine; the episode's own deadline is what ends it."""


KEEP_ALIVE_SECONDS = 2.0
"""An idle connection is given up before the server does, which is after 5 s."""


class EngineGone(EngineError):
    """The engine did not answer at all: not the doing of the request or of the agent behind it."""


@dataclass(frozen=True)
class Completion:
    """What the engine sampled."""

    token_ids: tuple[int, ...]
    """The stop token among them, if one came."""
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    stop_reason: str


class EngineClient:
    """One keep-alive client for all calls of a run. Belongs to one event loop."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        connections: int = 256,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.version = 0
        """Version to note for tokens of an engine that does not tell one."""
        self._model = model
        limits = httpx.Limits(
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=KEEP_ALIVE_SECONDS,
        )
        self._http = httpx.AsyncClient(
            base_url=base_url,
            limits=limits,
            timeout=REQUEST_SECONDS,
            trust_env=False,
            transport=transport,
        )

    async def complete(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        seed: int,
        stop_ids: Sequence[int],
        **sampling: Any,
    ) -> Completion:
        """Samples one answer to a prompt of token ids.

        sampling: temperature, top_p, top_k. Errors: EngineError with the engine's own words; EngineGone.
        """
        body = {
            "model": self._model,
            "prompt": list(prompt_ids),
            "max_tokens": max_tokens,
            "seed": seed,
            "stop_token_ids": list(stop_ids),
            "logprobs": 0,
            "return_token_ids": True,
            **sampling,
        }
        try:
            response = await self._http.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise EngineGone(f"engine: no answer to a completion ({type(error).__name__})") from error
        if response.status_code != 200:
            raise EngineError(f"engine: {_message(response)}")
        return self._completion(response.json()["choices"][0])

    async def close(self) -> None:
        await self._http.aclose()

    def _completion(self, choice: dict[str, Any]) -> Completion:
        ids = tuple(choice.get("token_ids") or ())
        logprobs = tuple((choice.get("logprobs") or {}).get("token_logprobs") or ())
        versions = tuple(choice.get("weight_versions") or (self.version,) * len(ids))
        if not len(ids) == len(logprobs) == len(versions) > 0:
            raise EngineError(
                f"engine: expected an id, a log-probability and a version per token, got {len(ids)} ids, "
                f"{len(logprobs)} log-probabilities, {len(versions)} versions"
            )
        return Completion(ids, logprobs, versions, choice["finish_reason"])


def healthy(base_url: str, *, seconds: float) -> bool:
    """Whether the engine answered /health within `seconds` of this one request."""
    try:
        return httpx.get(f"{base_url}/health", timeout=seconds, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def load_weights(base_url: str, folder: Path, version: int, *, seconds: float = 120.0) -> None:
    """Puts a published model folder into the engine; returns when it samples from it.

    Errors: EngineError with the engine's own words.
    """
    body = {"path": str(folder.resolve()), "version": version}
    try:
        response = httpx.post(f"{base_url}/admin/weights", json=body, timeout=seconds, trust_env=False)
    except httpx.HTTPError as error:
        raise EngineError(
            f"engine: no answer to weights version {version} ({type(error).__name__})"
        ) from error
    if response.status_code != 200:
        raise EngineError(f"engine: weights version {version} refused: {_message(response)}")


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}: {response.text[:200]}"
