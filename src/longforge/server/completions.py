"""POST /v1/completions: text or token ids in, text and on demand token ids and log-probabilities out."""

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from longforge.chat import Tokenizer
from longforge.engine import TokenEvent
from longforge.errors import LongforgeError
from longforge.server.answer import Answer, Part
from longforge.server.replies import (
    DONE,
    ReplyHead,
    TokenRecord,
    completion_body,
    completion_choice,
    sse,
    usage_body,
)
from longforge.server.service import EventStream, Service, failed, model_check, unless_gone
from longforge.server.wire import CompletionRequest

__all__ = ["completions_router"]


def completions_router(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        if wrong := model_check(service, body.model):
            return wrong
        prompt = service.tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        params = body.params(body.limit, service.tokenizer.stop_ids, body.logprobs or 0)
        answer = Answer(
            service.loop, service.tokenizer, prompt, params, stops=body.stops, eager=bool(body.stream)
        )
        head = ReplyHead(service.model_name, "cmpl")
        if body.stream:
            return EventStream(_events(answer, body, head, service.tokenizer), answer.close)
        try:
            part = await unless_gone(request, answer.whole())
        finally:
            answer.close()
        choice = _choice(part, body, service.tokenizer, prompt)
        return JSONResponse(completion_body(head, choice, usage_body(len(prompt), len(part.events))))

    return router


async def _events(
    answer: Answer, body: CompletionRequest, head: ReplyHead, tokenizer: Tokenizer
) -> AsyncIterator[bytes]:
    tokens = characters = 0
    try:
        async for part in answer.parts():
            prompt_ids = None if tokens else list(answer.prompt_ids)
            choice = _choice(part, body, tokenizer, prompt_ids, offset=characters)
            yield sse(completion_body(head, choice, None))
            tokens += len(part.events)
            characters += len(part.text)
    except LongforgeError as error:
        yield sse(failed(error)[1])
        return
    if body.wants_usage_chunk:
        usage = usage_body(len(answer.prompt_ids), tokens)
        yield sse(head.body("text_completion", choices=[], usage=usage))
    yield DONE


def _choice(
    part: Part,
    body: CompletionRequest,
    tokenizer: Tokenizer,
    prompt_ids: list[int] | None,
    offset: int = 0,
) -> dict[str, object]:
    return completion_choice(
        part.text,
        [_record(event, tokenizer, with_text=body.logprobs is not None) for event in part.events],
        part.reason,
        logprobs=body.logprobs,
        return_token_ids=bool(body.return_token_ids),
        prompt_ids=prompt_ids,
        offset=offset,
    )


def _record(event: TokenEvent, tokenizer: Tokenizer, *, with_text: bool) -> TokenRecord:
    if not with_text:
        return TokenRecord(event.token_id, "", event.logprob, event.version)
    top = tuple((tokenizer.decode((token,)), logprob) for token, logprob in event.top_logprobs)
    return TokenRecord(event.token_id, tokenizer.decode((event.token_id,)), event.logprob, event.version, top)
