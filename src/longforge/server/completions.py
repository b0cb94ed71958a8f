"""POST /v1/completions: text or token ids in, text and on demand token ids and log-probabilities out."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from longforge.errors import LongforgeError
from longforge.server.choices import all_of, close_all, merged, open_all
from longforge.server.completion import Completion
from longforge.server.completion_request import CompletionRequest
from longforge.server.encoding import encoded_texts
from longforge.server.event_stream import EventStream
from longforge.server.json_reply import JsonReply
from longforge.server.replies import DONE, ReplyHead, sse, usage_body
from longforge.server.service import Service, caller_of, failed, model_check, unless_gone

__all__ = ["completions_router"]

KIND = "text_completion"


def completions_router(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        if wrong := model_check(service, body.model):
            return wrong
        caller = caller_of(request)
        prompts = await _prompt_ids(service, body)
        answers = open_all(
            [
                partial(Completion, service, caller, body, prompt, place * body.choices + choice, choice)
                for place, prompt in enumerate(prompts)
                for choice in range(body.choices)
            ]
        )
        head = ReplyHead(service.model_name, "cmpl")
        if body.stream:
            return EventStream(_events(answers, body, head), partial(close_all, answers), service.patience)
        try:
            choices = await unless_gone(request, all_of([answer.whole() for answer in answers]))
        finally:
            close_all(answers)
        return JsonReply(head.body(KIND, choices=choices, usage=_usage(answers, body)))

    return router


async def _prompt_ids(service: Service, body: CompletionRequest) -> list[list[int]]:
    """The ids of each prompt: its own, or those of its text."""
    texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
    encoded = iter(await encoded_texts(service.tokenizer, texts, service.loop.engine.context))
    return [next(encoded) if isinstance(prompt, str) else prompt for prompt in body.prompts]


async def _events(
    answers: list[Completion], body: CompletionRequest, head: ReplyHead
) -> AsyncIterator[bytes]:
    more: dict[str, Any] = {"usage": None} if body.wants_usage_chunk else {}
    try:
        async for _, choice in merged([answer.chunks() for answer in answers]):
            if body.wants_usage_always:
                more["usage"] = _usage(answers, body)
            yield sse(head.body(KIND, choices=[choice], **more))
    except LongforgeError as error:
        yield sse(failed(error)[1])
        return
    if body.wants_usage_chunk:
        yield sse(head.body(KIND, choices=[], usage=_usage(answers, body)))
    yield DONE


def _usage(answers: list[Completion], body: CompletionRequest) -> dict[str, Any]:
    """The tokens of all answers; each prompt counts once."""
    firsts = answers[:: body.choices]
    return usage_body(
        sum(len(answer.prompt_ids) for answer in firsts),
        sum(answer.completion_tokens for answer in answers),
        cached_tokens=sum(answer.cached_tokens for answer in firsts),
    )
