"""POST /tokenize and /detokenize: text or a conversation as the token ids that the model would see."""

from typing import Any

from fastapi import APIRouter, Response
from pydantic import Field, model_validator

from longforge.chat import encode_prompt
from longforge.errors import InputError
from longforge.server.chat_request import TemplateArguments
from longforge.server.json_reply import JsonReply
from longforge.server.service import Service, model_check
from longforge.server.token_report import token_text
from longforge.server.wire import MAX_MESSAGES, MAX_TOOLS, Body, ChatMessage, Tool, to_messages, to_tools

__all__ = ["tokenize_router"]


class TokenizeRequest(Body):
    """Body of POST /tokenize: either `prompt`, as /v1/completions takes it, or `messages` and `tools`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    chat_template_kwargs: TemplateArguments | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        if self.messages is None and (self.tools or self.chat_template_kwargs):
            raise ValueError("tools and chat_template_kwargs belong to messages")
        return self


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def tokenize_router(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter()
    tokenizer = service.tokenizer

    @router.post("/tokenize", response_model=None)
    def tokenize(body: TokenizeRequest) -> Response:
        if wrong := model_check(service, body.model or service.model_name):
            return wrong
        ids = _ids(service, body)
        reply: dict[str, Any] = {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": service.loop.engine.context,
        }
        if body.return_token_strs:
            reply["token_strs"] = [token_text(tokenizer, token) for token in ids]
        return JsonReply(reply)

    @router.post("/detokenize", response_model=None)
    def detokenize(body: DetokenizeRequest) -> Response:
        if wrong := model_check(service, body.model or service.model_name):
            return wrong
        size = service.loop.engine.config.vocab_size
        for token in body.tokens:
            if not 0 <= token < size:
                raise InputError(f"tokens: expected ids from 0 to {size - 1}, got {token}")
        return JsonReply({"prompt": tokenizer.decode(body.tokens)})

    return router


def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        return service.tokenizer.encode(body.prompt)
    template = body.chat_template_kwargs or TemplateArguments()
    return encode_prompt(
        service.tokenizer,
        to_messages(body.messages or []),
        to_tools(body.tools or []),
        family=service.loop.engine.config.family,
        thinking=template.mode or "adaptive",
    )
