"""One turn of the assistant, whatever the dialect: a conversation in; thinking, text and calls out."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from longforge.chat import Family, ThinkingMode, starts_in_thinking
from longforge.chat.constraint import Constraint, answer_grammar
from longforge.chat.format import call_text
from longforge.chat.parser import ChatParser, Delta, message_of
from longforge.engine import TokenEvent
from longforge.protocol import Message, SamplingParams, StopReason, ToolSpec
from longforge.server.answer import Answer
from longforge.server.budget import BudgetedAnswer
from longforge.server.replies import new_call_id
from longforge.server.service import Caller, Service

__all__ = ["Turn", "TurnPart"]


@dataclass(frozen=True, slots=True)
class TurnPart:
    """What one batch of tokens adds."""

    deltas: list[Delta]
    events: list[TokenEvent]
    reason: StopReason | None
    """Set on the last part."""


class Turn:
    """One answer to a conversation. It is refused in the constructor or not at all; `close` it when done.

    prompt_ids: the conversation as `tools` and `thinking` have it rendered. params: the model's stop tokens
    (stop_ids, if given, in their place) are added here. eager: parts come token by token, else all at the
    end. thinking_budget: most tokens of thinking where the prompt opens it; then it is closed for the model.
    Each call has an id from its call_start on; calls are text where no tools were offered. Errors:
    InputError, ContextOverflow, EngineError.
    """

    def __init__(
        self,
        service: Service,
        caller: Caller,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        tools: Sequence[ToolSpec] = (),
        thinking: ThinkingMode = "adaptive",
        constraint: Constraint = Constraint(),
        stops: Sequence[str] = (),
        eager: bool,
        priority: int = 0,
        report_blocks: bool = False,
        stop_ids: Sequence[int] | None = None,
        thinking_budget: int | None = None,
    ) -> None:
        tokenizer, family = service.tokenizer, service.loop.engine.config.family
        thinking_open = starts_in_thinking(family, thinking)
        budgeted = thinking_budget is not None and thinking_open
        params = replace(
            params,
            stop_token_ids=(*(tokenizer.stop_ids if stop_ids is None else stop_ids), *params.stop_token_ids),
            grammar=answer_grammar(
                constraint,
                tools,
                family,
                thinking_open and not budgeted,
                tokenizer,
                may_think=thinking != "disabled" and not budgeted,
            ),
        )
        self.stop_ids = frozenset(params.stop_token_ids)
        """Tokens that end the answer and are no part of its text."""
        self._reader = _Reader(tools, family, thinking_open)
        self.completion_tokens = 0
        self.thinking_tokens = 0
        """Of these, tokens that ended while the model was still thinking."""
        open_answer = partial(
            Answer,
            service.loop,
            tokenizer,
            stops=stops,
            eager=eager,
            tenant=caller.tenant,
            priority=priority,
            report_blocks=report_blocks,
            observer=service.observer,
        )
        self._answer = (
            open_answer(prompt_ids, params)
            if thinking_budget is None or not thinking_open
            else BudgetedAnswer(
                open_answer,
                prompt_ids,
                params,
                budget=thinking_budget,
                family=family,
                tokenizer=tokenizer,
                context=service.loop.engine.context,
            )
        )

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The conversation as token ids."""
        return self._answer.prompt_ids

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the cache; known from the first part on."""
        return self._answer.cached_tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._answer.stop_string

    @property
    def calls(self) -> int:
        """Tool calls so far."""
        return self._reader.calls

    def close(self) -> None:
        """Cancels the generation if it still runs."""
        self._answer.close()

    async def parts(self) -> AsyncIterator[TurnPart]:
        """The parts in order; the last one has a reason. Errors: EngineError if the engine stops."""
        async for part in self._answer.parts():
            self.completion_tokens += len(part.events)
            deltas: list[Delta] = []
            for piece in part.pieces:
                deltas += self._reader.push(piece)
                self.thinking_tokens += self._reader.thinking
            if part.reason is not None:
                deltas += self._reader.finish()
            yield TurnPart(_joined(deltas), part.events, part.reason)

    async def whole(self) -> tuple[Message, StopReason]:
        """The whole answer as one message, and why it ended."""
        message, reason, _ = await self.whole_with_events()
        return message, reason

    async def whole_with_events(self) -> tuple[Message, StopReason, list[TokenEvent]]:
        """The same, and its tokens."""
        deltas: list[Delta] = []
        events: list[TokenEvent] = []
        reason = None
        async for part in self.parts():
            deltas += part.deltas
            events += part.events
            reason = part.reason
        assert reason is not None, "a whole answer has ended"
        return message_of(deltas), reason, events


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbours of the same kind of text as one."""
    joined: list[Delta] = []
    for delta in deltas:
        if joined and delta.call is None and joined[-1].kind == delta.kind:
            joined[-1] = Delta(delta.kind, joined[-1].text + delta.text)
        else:
            joined.append(delta)
    return joined


class _Reader:
    """Deltas of one answer: calls get ids, and a call is text where no tools were offered."""

    def __init__(self, tools: Sequence[ToolSpec], family: Family, thinking_open: bool) -> None:
        self._tools = tools
        self._family: Family = family
        self._parser = ChatParser(family, tools, thinking_open)
        self._id = ""
        self.calls = 0
        self.thinking = thinking_open
        """Whether the last that came was thinking."""

    def push(self, text: str) -> list[Delta]:
        return self._given(self._parser.push(text))

    def finish(self) -> list[Delta]:
        return self._given(self._parser.finish())

    def _given(self, deltas: list[Delta]) -> list[Delta]:
        if deltas:
            self.thinking = deltas[-1].kind == "thinking"
        return [allowed for delta in deltas if (allowed := self._allowed(delta)) is not None]

    def _allowed(self, delta: Delta) -> Delta | None:
        if delta.kind in ("thinking", "content"):
            return delta
        if not self._tools:
            if delta.kind != "call_end" or delta.call is None:
                return None
            return Delta("content", call_text(delta.call, self._family, nulls=True))
        if delta.kind == "call_start":
            self.calls += 1
            self._id = new_call_id()
        if delta.call is None:
            return delta
        return replace(delta, call=replace(delta.call, id=self._id))
