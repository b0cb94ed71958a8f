"""The chunks of a chat reply as it comes."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from longforge.chat.parser import Delta
from longforge.engine import TokenEvent
from longforge.errors import LongforgeError
from longforge.server.chat_request import ChatRequest
from longforge.server.choices import merged
from longforge.server.replies import (
    DONE,
    ReplyHead,
    chat_chunk,
    finish_reason,
    sse,
    thinking_fields,
    usage_body,
)
from longforge.server.service import Service, failed
from longforge.server.token_report import block_report, chat_logprobs
from longforge.server.turn import Turn, TurnPart

__all__ = ["ChatStream", "turn_usage"]


def turn_usage(turns: Sequence[Turn]) -> dict[str, Any]:
    """The tokens of all choices; their prompt counts once."""
    return usage_body(
        len(turns[0].prompt_ids),
        sum(turn.completion_tokens for turn in turns),
        cached_tokens=turns[0].cached_tokens,
        thinking_tokens=sum(turn.thinking_tokens for turn in turns),
    )


class ChatStream:
    """One streamed reply with one or several choices."""

    def __init__(self, service: Service, turns: list[Turn], body: ChatRequest, head: ReplyHead) -> None:
        self._service = service
        self._turns = turns
        self._body = body
        self._head = head
        self._calls = [-1] * len(turns)
        """Place of the present tool call of each choice."""

    async def events(self) -> AsyncIterator[bytes]:
        """All events. An error that comes on the way is the last one."""
        for place in range(len(self._turns)):
            yield self._opening(place)
        try:
            async for place, part in merged([turn.parts() for turn in self._turns]):
                if chunks := self._of_part(place, part):
                    yield b"".join(chunks)  # one write
        except LongforgeError as error:
            yield sse(failed(error)[1])
            return
        if self._body.wants_usage_chunk:
            usage = turn_usage(self._turns)
            yield sse(self._head.body("chat.completion.chunk", choices=[], usage=usage))
        yield DONE

    def _opening(self, place: int) -> bytes:
        chunk = chat_chunk(self._head, {"role": "assistant", "content": ""}, index=place)
        if self._body.return_token_ids:
            prompt = list(self._turns[place].prompt_ids)
            chunk["prompt_token_ids"] = prompt
            chunk["choices"][0] |= {"prompt_token_ids": prompt, "token_ids": [], "weight_versions": []}
        return self._sent(chunk)

    def _of_part(self, place: int, part: TurnPart) -> list[bytes]:
        """The chunks of a part; the first of them tells about its tokens."""
        deltas: list[dict[str, Any]] = []
        for delta in part.deltas:
            self._calls[place] += delta.kind == "call_start"
            if fields := self._delta(delta, self._calls[place]):
                deltas.append(fields)
        body = self._body
        if not deltas and (body.logprobs or body.return_token_ids or body.report_blocks):
            deltas.append({})  # nothing to read yet, but the tokens have come
        chunks = [
            self._chunk(place, delta, part.events if number == 0 else [])
            for number, delta in enumerate(deltas)
        ]
        if part.reason is not None:
            finish = finish_reason(
                part.reason, tool_calls=self._turns[place].calls > 0, named=body.named_tool is not None
            )
            chunks.append(self._chunk(place, {}, [], finish))
        return chunks

    def _chunk(
        self, place: int, delta: dict[str, Any], events: list[TokenEvent], finish: str | None = None
    ) -> bytes:
        body = self._body
        logprobs = None
        if body.logprobs and events:
            stop_ids = self._turns[place].stop_ids
            logprobs = chat_logprobs(self._service.tokenizer, events, body.alternatives, stop_ids)
        chunk = chat_chunk(self._head, delta, finish, index=place, logprobs=logprobs)
        if body.return_token_ids:
            chunk["choices"][0]["token_ids"] = [event.token_id for event in events]
            chunk["choices"][0]["weight_versions"] = [event.version for event in events]
        if body.report_blocks and events:
            chunk["longforge"] = block_report(events, self._service.loop.engine.config.block_size)
        return self._sent(chunk)

    def _sent(self, chunk: dict[str, Any]) -> bytes:
        if self._body.wants_usage_always:
            chunk["usage"] = turn_usage(self._turns)
        elif self._body.wants_usage_chunk:
            chunk["usage"] = None
        return sse(chunk)

    def _delta(self, delta: Delta, place: int) -> dict[str, Any]:
        """The fields of one chunk's delta; none for the end of a call, which says nothing new."""
        match delta.kind:
            case "thinking":
                return thinking_fields(delta.text, split=bool(self._body.reasoning_split))
            case "content":
                return {"content": delta.text}
            case "call_start":
                assert delta.call is not None, "a call starts with its name"
                call = {"id": delta.call.id, "type": "function"}
                function = {"name": delta.call.name, "arguments": ""}
                return {"tool_calls": [{"index": place, **call, "function": function}]}
            case "call_arguments":
                return {"tool_calls": [{"index": place, "function": {"arguments": delta.text}}]}
            case _:
                return {}
