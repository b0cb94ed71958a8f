"""The gateway: chat messages in from any agent, token ids and log-probabilities into the pool.

An agent knows a base URL and a key. The key names its episode; nothing else tells the gateway who calls. A
call:

    messages -> prompt ids (encode_prompt) -> engine -> sampled ids -> pool -> parsed message -> agent

Ids are recorded as the engine made them and never tokenised again. How a call samples is fixed by the run
(the policy under training decides, not its user); an agent may only ask for fewer tokens, unless the run
allows more. A stream is answered from the finished answer: agents that need streaming work, nothing arrives
sooner.
"""

import hashlib
import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError

from longforge.chat import Family, ThinkingMode, Tokenizer, encode_prompt, starts_in_thinking
from longforge.chat.parser import parse
from longforge.errors import ContextOverflow, EngineError, InputError
from longforge.forge.engine_client import Completion, EngineClient, EngineGone
from longforge.forge.pool import Pool
from longforge.forge.served_fields import unserved_field
from longforge.forge.streamed_reply import streamed
from longforge.protocol import Call, Message, StopReason
from longforge.server.chat_request import ChatRequest
from longforge.server.invalid import describe_invalid
from longforge.server.json_reply import JsonReply
from longforge.server.replies import (
    ReplyHead,
    chat_body,
    chat_choice,
    error_body,
    finish_reason,
    new_call_id,
    reply_message,
    usage_body,
)
from longforge.server.wire import message_body, to_messages

__all__ = ["Gateway", "Policy", "call_seed"]


@dataclass(frozen=True)
class Policy:
    """How the calls of an episode sample."""

    max_tokens: int
    temperature: float = 1.0
    thinking: ThinkingMode = "adaptive"
    allow_request_sampling: bool = False
    """Follow the agent's own temperature, top_p, top_k and thinking."""

    def sampling(self, request: ChatRequest) -> dict[str, Any]:
        """What to ask of the engine for a request."""
        chosen: dict[str, Any] = {"temperature": self.temperature}
        if self.allow_request_sampling:
            asked = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
            chosen |= {name: value for name, value in asked.items() if value is not None}
        return chosen


@dataclass
class _Session:
    """An episode that may call."""

    episode_id: str
    policy: Policy
    calls: int = 0
    finished: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """(call id, prompt and answer) of calls that have been answered."""
    transcript: list[Message] = field(default_factory=list)
    """The conversation of the latest call, its answer included."""
    sampled_tokens: int = 0
    versions: set[int] = field(default_factory=set)

    def parent_of(self, prompt: list[int]) -> str | None:
        """The latest call that this prompt extends exactly: same ids, prompt and answer."""
        for call_id, ids in reversed(self.finished):
            if len(ids) <= len(prompt) and tuple(prompt[: len(ids)]) == ids:
                return call_id
        return None


class _Refused(Exception):
    """A request that gets an error reply."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        kind = {401: "authentication_error", 502: "server_error"}.get(status, "invalid_request_error")
        self.reply = JsonReply(error_body(message, kind, param=param, code=code), status)
        super().__init__(message)


class Gateway:
    """Chat Completions for episodes. `app` is the ASGI application; keys may be issued from any thread."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        engine: EngineClient,
        pool: Pool,
        family: Family,
        context: int,
        model_name: str,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._engine = engine
        self._pool = pool
        self._family: Family = family
        self._context = context
        self._model_name = model_name
        self._seed = seed
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()
        self.sampled_tokens = 0
        """Tokens sampled so far, for the tokens-per-second figure."""
        self.engine_gone: EngineGone | None = None
        """Set when the engine is not there any more; what agents do after that says nothing of them."""
        self.app = FastAPI(openapi_url=None)
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        self.app.add_api_route("/v1/models", self._models, methods=["GET"])
        self.app.add_api_route("/health", self._health, methods=["GET"])

    def issue_key(self, episode_id: str, policy: Policy) -> str:
        """A fresh key for one episode."""
        key = f"lf-{secrets.token_hex(16)}"
        with self._lock:
            self._sessions[key] = _Session(episode_id, policy)
        return key

    def revoke(self, key: str) -> dict[str, Any]:
        """Ends a key; later calls with it get 401.

        Returns what its episode did, for people to read: `messages` (the conversation of the latest call,
        thinking and tool calls included), `calls`, `sampled_tokens` and `versions` (lowest and highest).
        """
        with self._lock:
            session = self._sessions.pop(key)
        return {
            "messages": [message_body(message) for message in session.transcript],
            "calls": len(session.finished),
            "sampled_tokens": session.sampled_tokens,
            "versions": [min(session.versions), max(session.versions)] if session.versions else [],
        }

    async def _health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def _models(self) -> dict[str, Any]:
        model = {"id": self._model_name, "object": "model", "created": 0, "owned_by": "longforge"}
        return {"object": "list", "data": [model]}

    async def _chat(self, request: Request) -> Response:
        try:
            session = self._session(request)
            chat = _body(await request.body())
            return await self._answer(session, chat)
        except _Refused as refused:
            return refused.reply

    def _session(self, request: Request) -> _Session:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        with self._lock:
            session = self._sessions.get(key.strip()) if scheme.lower() == "bearer" else None
        if session is None:
            raise _Refused(
                401, "api key: expected the key of an episode that is running", code="invalid_api_key"
            )
        return session

    async def _answer(self, session: _Session, chat: ChatRequest) -> Response:
        thinking = session.policy.thinking
        if session.policy.allow_request_sampling and chat.asked_thinking is not None:
            thinking = chat.asked_thinking
        messages, prompt = self._prompt(chat, thinking)
        index = session.calls
        session.calls += 1
        began = time.perf_counter()
        completion = await self._complete(session, chat, prompt, index)
        call = Call(
            call_id=f"{session.episode_id}#{index}",
            episode_id=session.episode_id,
            index=index,
            prompt_ids=tuple(prompt),
            sampled_ids=completion.token_ids,
            logprobs=completion.logprobs,
            versions=completion.versions,
            stop_reason=completion.stop_reason,
            parent_id=session.parent_of(prompt),
            seconds=time.perf_counter() - began,
        )
        if not self._pool.add_call(call):
            raise _Refused(401, "api key: the episode has ended", code="invalid_api_key")
        session.finished.append((call.call_id, call.prompt_ids + call.sampled_ids))
        session.sampled_tokens += len(call.sampled_ids)
        session.versions |= set(call.versions)
        self.sampled_tokens += len(call.sampled_ids)
        message = self._message(call, chat, thinking)
        session.transcript = [*messages, message]
        return self._reply(chat, call, message)

    def _prompt(self, chat: ChatRequest, thinking: ThinkingMode) -> tuple[list[Message], list[int]]:
        if (name := unserved_field(chat)) is not None:
            message = f"{name}: a run does not serve it; its calls are recorded as its policy samples them"
            raise _Refused(400, message, param=name)
        try:
            messages = to_messages(chat.messages)
            prompt = encode_prompt(
                self._tokenizer, messages, chat.offered_tools, family=self._family, thinking=thinking
            )
            if len(prompt) >= self._context:
                raise ContextOverflow(len(prompt), self._context)
        except ContextOverflow as error:
            raise _Refused(400, str(error), param="messages", code="context_length_exceeded") from error
        except InputError as error:
            raise _Refused(400, str(error), param="messages") from error
        return messages, prompt

    async def _complete(
        self, session: _Session, chat: ChatRequest, prompt: list[int], index: int
    ) -> Completion:
        policy = session.policy
        asked = chat.max_completion_tokens or chat.max_tokens or policy.max_tokens
        limit = min(asked, policy.max_tokens, self._context - len(prompt))
        try:
            return await self._engine.complete(
                prompt,
                max_tokens=limit,
                seed=call_seed(self._seed, session.episode_id, index),
                stop_ids=self._tokenizer.stop_ids,
                **policy.sampling(chat),
            )
        except EngineError as error:
            if isinstance(error, EngineGone):
                self.engine_gone = error
            raise _Refused(502, str(error)) from error

    def _message(self, call: Call, chat: ChatRequest, thinking: ThinkingMode) -> Message:
        stops = set(self._tokenizer.stop_ids)
        ids = call.sampled_ids
        text = self._tokenizer.decode(ids[:-1] if ids[-1] in stops else ids)
        opened = starts_in_thinking(self._family, thinking)
        message = parse(text, self._family, chat.offered_tools, opened)
        return replace(message, tool_calls=tuple(replace(c, id=new_call_id()) for c in message.tool_calls))

    def _reply(self, chat: ChatRequest, call: Call, message: Message) -> Response:
        head = ReplyHead(self._model_name, "chatcmpl")
        reason = StopReason(call.stop_reason)
        usage = usage_body(len(call.prompt_ids), len(call.sampled_ids))
        split = bool(chat.reasoning_split)
        if not chat.stream:
            finish = finish_reason(reason, tool_calls=bool(message.tool_calls))
            choice = chat_choice(reply_message(message, split=split), finish)
            return JsonReply(chat_body(head, [choice], usage))
        last = usage if chat.wants_usage_chunk else None
        events = streamed(head, message, reason, last, split)
        return StreamingResponse(events, media_type="text/event-stream")


def call_seed(run_seed: int, episode_id: str, index: int) -> int:
    """Seed of one call: a run with the same seed and the same weights samples the same tokens."""
    digest = hashlib.blake2b(f"{run_seed}/{episode_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _body(raw: bytes) -> ChatRequest:
    try:
        return ChatRequest.model_validate_json(raw)
    except ValidationError as error:
        message, param = describe_invalid(error.errors(include_url=False))
        raise _Refused(400, message, param=param) from error
