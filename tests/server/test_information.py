"""What the server tells about itself: readiness, version, models, tokens."""

from typing import Any

import pytest

from longforge import __version__
from longforge.chat import encode_prompt
from longforge.server.wire import message_body, tool_body
from small_server import GREP, HTTP, QUESTION


def post(served: Any, path: str, **body: Any) -> Any:
    return HTTP.post(f"{served.url}{path}", json=body)


def test_a_living_server_is_ready_and_tells_its_version(served: Any):
    ready = HTTP.get(f"{served.url}/ready")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    assert HTTP.get(f"{served.url}/version").json() == {"version": __version__}


def test_a_model_tells_its_context(served: Any):
    card = HTTP.get(f"{served.url}/v1/models/small").json()
    assert (card["id"], card["max_model_len"]) == ("small", 1024)
    assert HTTP.get(f"{served.url}/v1/models/a/b").status_code == 404


def test_text_goes_to_tokens_and_back(served: Any):
    text = "naïve café ☕ [e~["
    reply = post(served, "/tokenize", prompt=text, return_token_strs=True).json()
    ids = served.tokenizer.encode(text)
    assert reply["tokens"] == ids and reply["count"] == len(ids) and reply["max_model_len"] == 1024
    assert len(reply["token_strs"]) == len(ids) and reply["token_strs"][-1] == "[e~["
    assert post(served, "/detokenize", tokens=ids, model="small").json() == {"prompt": text}


def test_a_conversation_is_tokenised_as_it_would_be_served(served: Any):
    body = {"messages": [message_body(QUESTION)], "tools": [tool_body(GREP)]}
    expected = encode_prompt(served.tokenizer, [QUESTION], (GREP,))
    assert post(served, "/tokenize", model="small", **body).json()["tokens"] == expected
    asked = {"model": "small", "max_tokens": 1, "return_token_ids": True, **body}
    assert post(served, "/v1/chat/completions", **asked).json()["prompt_token_ids"] == expected


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "either prompt"),
        ("/tokenize", {"prompt": "a", "tools": [tool_body(GREP)]}, "belong to messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [300]}, "tokens: expected ids from 0 to 299, got 300"),
        ("/detokenize", {"tokens": [-1]}, "got -1"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_what_cannot_be_tokenised_is_a_400(served: Any, path: str, body: dict[str, Any], words: str):
    reply = post(served, path, **body)
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]


def test_another_models_tokens_are_a_404(served: Any):
    assert post(served, "/tokenize", model="other", prompt="a").status_code == 404
    assert post(served, "/detokenize", model="other", tokens=[1]).status_code == 404
