"""Which fields of a chat request a run does not serve: it records calls as the policy under training makes
them, and nothing that an agent asks for may change what is sampled beyond that."""

from longforge.server.chat_request import ChatRequest

__all__ = ["unserved_field"]

NEUTRAL = {
    "n": 1,
    "min_p": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "stop": [],
    "stop_token_ids": [],
    "min_tokens": 0,
    "ignore_eos": False,
    "logprobs": False,
    "return_token_ids": False,
    "priority": 0,
    "report_blocks": False,
    "parallel_tool_calls": True,
}
"""Fields that may only say what is so without them."""


def unserved_field(chat: ChatRequest) -> str | None:
    """The name of a field that asks for what a run does not serve, or None."""
    for name, neutral in NEUTRAL.items():
        value = getattr(chat, name)
        if value is not None and value != neutral:
            return name
    if chat.constraint.calls == "required":
        return "tool_choice"
    if chat.constraint.schema is not None:
        return "response_format"
    if chat.wants_usage_always:
        return "stream_options"
    return None
