"""A body that does not validate is told in one line that names the field."""

from typing import Any

import pytest
from pydantic import ValidationError

from longforge.server.anthropic.wire import MessagesRequest
from longforge.server.chat_request import ChatRequest
from longforge.server.invalid import describe_invalid


def refused(**fields: Any) -> tuple[str, str | None]:
    body = {"model": "m", "messages": [{"role": "user", "content": "q"}], **fields}
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    return describe_invalid(caught.value.errors())


@pytest.mark.parametrize("name", ["logit_fun", "str", "list", "a[b]"])
def test_an_unknown_field_is_named_whatever_it_is_called(name: str):
    """The names of types and brackets also stand in pydantic's places, where they are no fields."""
    assert refused(**{name: 1}) == (f"{name}: this server does not support the field; leave it out", name)


def test_a_name_of_several_lines_is_told_in_one():
    message, field = refused(**{"a\nb": 1})
    assert message.startswith('"a\\nb": this server does not support') and field == "a\nb"


def test_of_a_union_the_member_that_was_meant_is_told():
    part = {"type": "text", "text": "q", "cache_control": {}}
    message, field = refused(messages=[{"role": "user", "content": [part]}])
    assert message.startswith("messages[0].content[0].cache_control: this server does not support")
    assert field == "messages"


def test_no_tag_of_a_union_is_told_as_a_key():
    def told(body: dict[str, Any]) -> str:
        asked = {"model": "m", "max_tokens": 5, **body}
        with pytest.raises(ValidationError) as caught:
            MessagesRequest.model_validate(asked)
        return describe_invalid(caught.value.errors(), asked)[0]

    def of_user(*blocks: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": list(blocks)}]}

    assert told(of_user({"type": "text"})) == (
        "messages[0].content[0].text: expected a value, the field is missing"
    )
    assert told(of_user({"type": "text", "text": "a"}, {"type": "text", "text": 5})).startswith(
        "messages[0].content[1].text: "
    )
    assert told(of_user({"type": "text", "text": "a", "user": 1})).startswith(
        "messages[0].content[0].user: this server does not support"
    )
    assert told({"messages": [{"role": "wizard", "content": "a"}]}).startswith("messages[0]: ")


def test_a_wrong_value_too_deep_to_write_down_is_still_one_line():
    value: Any = []
    for _ in range(100_000):
        value = [value]
    error = {"type": "string_type", "loc": ("body", "model"), "msg": "Input should be text", "input": value}
    told = "model: input should be text, got a value nested too deeply to show"
    assert describe_invalid([error]) == (told, "model")
