"""One answer of /v1/completions as the choice of a reply, whole or in chunks."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from longforge.engine import TokenEvent
from longforge.server.answer import Answer, Part
from longforge.server.completion_request import CompletionRequest
from longforge.server.replies import finish_reason
from longforge.server.service import Caller, Service, allowed_priority
from longforge.server.token_report import Offsets, completion_logprobs

__all__ = ["Completion"]


class Completion:
    """It is refused in the constructor or not at all; `close` it when done.

    index: its place among all answers of the request. choice: its place among those to the same prompt.
    """

    def __init__(
        self,
        service: Service,
        caller: Caller,
        body: CompletionRequest,
        prompt_ids: Sequence[int],
        index: int,
        choice: int,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.completion_tokens = 0
        self._body = body
        self._index = index
        self._tokenizer = service.tokenizer
        self._offsets = Offsets(service.tokenizer)
        params = body.params(
            service.tokenizer.stop_ids,
            choice,
            top_logprobs=body.logprobs or 0,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        self._prompt_only = params.max_tokens == 0
        if self._prompt_only:
            # The engine samples at least one token; it is dropped here.
            params = replace(params, max_tokens=1, stop_token_ids=())
        self._answer = Answer(
            service.loop,
            service.tokenizer,
            prompt_ids,
            params,
            stops=() if self._prompt_only else body.stops,
            eager=bool(body.stream),
            tenant=caller.tenant,
            priority=allowed_priority(caller, body.priority),
            observer=service.observer,
        )

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the cache; known from the first chunk on."""
        return self._answer.cached_tokens

    def close(self) -> None:
        """Cancels the generation if it still runs."""
        self._answer.close()

    async def whole(self) -> dict[str, Any]:
        """Everything as one choice."""
        return self._choice(await self._answer.whole(), first=True)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The choice in pieces; the first tells about the prompt, the last why the answer ended."""
        first = True
        async for part in self._answer.parts():
            yield self._choice(part, first=first)
            first = False

    def _choice(self, part: Part, *, first: bool) -> dict[str, Any]:
        body, events, text = self._body, part.events, part.text
        prompt = part.events[0].prompt if first else ()
        if self._prompt_only:
            events, text = [], ""
        if body.echo and first:
            text = self._tokenizer.decode(self.prompt_ids) + text
        self.completion_tokens += len(events)
        choice: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": None,
            "finish_reason": None if part.reason is None else finish_reason(part.reason),
            "weight_versions": [event.version for event in events],
        }
        if body.logprobs is not None:
            echoed = list(zip(self.prompt_ids, prompt, strict=True)) if body.echo and first else []
            choice["logprobs"] = self._logprobs(echoed, events)
        if body.return_token_ids:
            choice["token_ids"] = [event.token_id for event in events]
            if first:
                choice["prompt_token_ids"] = list(self.prompt_ids)
        return choice

    def _logprobs(self, echoed: list[Any], events: Sequence[TokenEvent]) -> dict[str, Any]:
        alternatives = self._body.logprobs or 0
        return completion_logprobs(self._tokenizer, echoed, events, alternatives, self._offsets)
