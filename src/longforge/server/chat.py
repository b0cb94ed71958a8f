"""POST /v1/chat/completions: a conversation in, messages with thinking and tool calls out."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from longforge.engine import TokenEvent
from longforge.protocol import Message, StopReason
from longforge.server.chat_request import ChatRequest
from longforge.server.chat_stream import ChatStream, turn_usage
from longforge.server.choices import all_of, close_all, open_all
from longforge.server.encoding import encoded_conversation
from longforge.server.event_stream import EventStream
from longforge.server.json_reply import JsonReply
from longforge.server.replies import ReplyHead, chat_body, chat_choice, finish_reason, reply_message
from longforge.server.service import Caller, Service, allowed_priority, caller_of, model_check, unless_gone
from longforge.server.token_report import chat_logprobs
from longforge.server.turn import Turn
from longforge.server.wire import to_messages

__all__ = ["chat_router"]


def chat_router(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        if wrong := model_check(service, body.model):
            return wrong
        turns = open_turns(service, caller_of(request), body, await _prompt(service, body))
        head = ReplyHead(service.model_name, "chatcmpl")
        if body.stream:
            events = ChatStream(service, turns, body, head).events()
            return EventStream(events, partial(close_all, turns), service.patience)
        try:
            answers = await unless_gone(request, all_of([turn.whole_with_events() for turn in turns]))
        finally:
            close_all(turns)
        return JsonReply(_reply(service, body, head, turns, answers))

    return router


async def _prompt(service: Service, body: ChatRequest) -> list[int]:
    messages, context = to_messages(body.messages), service.loop.engine.context
    return await encoded_conversation(
        service, messages, body.offered_tools, body.thinking_mode, context=context
    )


def open_turns(service: Service, caller: Caller, body: ChatRequest, prompt_ids: list[int]) -> list[Turn]:
    """The choices of a request, each with a seed of its own."""

    def opener(choice: int) -> Turn:
        return Turn(
            service,
            caller,
            prompt_ids,
            body.params((), choice, top_logprobs=body.alternatives),
            tools=body.offered_tools,
            thinking=body.thinking_mode,
            constraint=body.constraint,
            stops=body.stops,
            eager=bool(body.stream),
            priority=allowed_priority(caller, body.priority),
            report_blocks=bool(body.report_blocks),
            stop_ids=() if body.ignore_eos else None,
        )

    return open_all([partial(opener, choice) for choice in range(body.choices)])


Answered = tuple[Message, StopReason, list[TokenEvent]]


def _reply(
    service: Service, body: ChatRequest, head: ReplyHead, turns: list[Turn], answers: list[Answered]
) -> dict[str, Any]:
    choices = [_choice(service, body, place, turns[place], answer) for place, answer in enumerate(answers)]
    reply = chat_body(head, choices, turn_usage(turns))
    if body.return_token_ids:
        reply["prompt_token_ids"] = list(turns[0].prompt_ids)
    return reply


def _choice(service: Service, body: ChatRequest, place: int, turn: Turn, answer: Answered) -> dict[str, Any]:
    message, reason, events = answer
    finish = finish_reason(reason, tool_calls=bool(message.tool_calls), named=body.named_tool is not None)
    logprobs = None
    if body.logprobs:
        logprobs = chat_logprobs(service.tokenizer, events, body.alternatives, turn.stop_ids)
    split = bool(body.reasoning_split)
    choice = chat_choice(reply_message(message, split=split), finish, index=place, logprobs=logprobs)
    if body.return_token_ids:
        choice["prompt_token_ids"] = list(turn.prompt_ids)
        choice["token_ids"] = [event.token_id for event in events]
        choice["weight_versions"] = [event.version for event in events]
    return choice
