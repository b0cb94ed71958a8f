"""Completions by token ids: what went in and what was sampled, with log-probabilities and versions."""

from typing import Any

import httpx
import openai
import pytest
import torch

from longforge.server.token_report import token_text

PROMPT = [5, 9, 2, 11, 7]


def complete(served: Any, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"model": "small", "prompt": PROMPT, "max_tokens": 6, "seed": 1, **fields}
    return served.client.completions.create(**fields, extra_body=extra or {})


def test_ids_go_in_and_come_out_with_the_models_logprobs(served: Any):
    answer = complete(served, {"return_token_ids": True, "top_k": 40}, logprobs=2, temperature=3.0, top_p=0.9)
    choice = answer.choices[0]
    ids = choice.token_ids
    assert choice.prompt_token_ids == PROMPT and len(ids) == 6 and choice.finish_reason == "length"
    with torch.no_grad():
        full = torch.log_softmax(served.model(torch.tensor([PROMPT + ids]))[0], dim=-1)[len(PROMPT) - 1 : -1]
    expected = full[torch.arange(6), torch.tensor(ids)].tolist()
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-5)
    assert choice.logprobs.tokens == [token_text(served.tokenizer, token) for token in ids]
    rows = zip(full, ids, choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True)
    for row, token, text, alternatives in rows:
        best = [token_text(served.tokenizer, other) for other in row.topk(2).indices.tolist()]
        assert set(alternatives) == {*best, text}, "the two likeliest and the token itself"
        assert alternatives[text] == pytest.approx(row[token].item(), abs=1e-5)
        assert [alternatives[b] for b in best] == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)
    assert choice.weight_versions == [served.loop.engine.version] * 6
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 6)


def test_ids_come_only_when_asked_for(served: Any):
    choice = complete(served).choices[0]
    assert choice.logprobs is None
    assert "token_ids" not in choice.model_dump() and "prompt_token_ids" not in choice.model_dump()


def test_a_seed_repeats_an_answer_alone_or_in_a_crowd(served: Any):
    alone = complete(served, {"return_token_ids": True}, max_tokens=12).choices[0].token_ids
    client = httpx.Client(base_url=served.url)
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 12, "seed": 1, "return_token_ids": True}
    streams = [
        served.client.completions.create(model="small", prompt=[i], max_tokens=90, stream=True)
        for i in (1, 2)
    ]
    crowded = client.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
    for stream in streams:
        stream.close()
    assert crowded == alone


def test_a_streamed_completion_adds_up(served: Any):
    whole = complete(served, {"return_token_ids": True}, logprobs=0).choices[0]
    chunks = list(complete(served, {"return_token_ids": True}, logprobs=0, stream=True))
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == whole.text
    assert [token for choice in choices for token in choice.token_ids] == whole.token_ids
    assert [value for choice in choices for value in choice.logprobs.token_logprobs] == pytest.approx(
        whole.logprobs.token_logprobs, abs=1e-5
    )
    # A reader slower than the engine gets several tokens in one chunk, so the number of chunks is not fixed.
    prompts = [choice.model_dump().get("prompt_token_ids") for choice in choices]
    assert prompts == [PROMPT] + [None] * (len(choices) - 1)
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]


def test_a_stop_token_is_among_the_ids_but_not_in_the_text(served: Any):
    free = complete(served, {"return_token_ids": True}, temperature=0).choices[0].token_ids
    stop = free[3]
    choice = complete(served, {"return_token_ids": True, "stop_token_ids": [stop]}, temperature=0).choices[0]
    end = free.index(stop)
    assert choice.token_ids == free[: end + 1]
    assert choice.text == served.tokenizer.decode(free[:end])
    assert choice.finish_reason == "stop"


def test_text_prompts_are_tokenised(served: Any):
    answer = complete(served, {"return_token_ids": True}, prompt="class A")
    assert answer.choices[0].prompt_token_ids == served.tokenizer.encode("class A")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt: expected at least 1 token"),
        ({"prompt": [5, 100_000]}, "prompt: expected token ids from 0 to 299, got 100000"),
        ({"prompt": [-1]}, "got -1"),
        ({"prompt": [1] * 1024}, "at most 1024 tokens fit the context, got 1025"),
        ({"best_of": 2}, "best_of: this server does not support"),
        ({"prompt": ["a"] * 200, "n": 2}, r"at most 256 answers \(prompts times n\), got 400"),
        ({"suffix": "x"}, "suffix: this server does not support"),
        ({"logprobs": 21}, "logprobs: .*20, got 21"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1 without echo, got 0"),
        ({"prompt": ["a", 5]}, r"prompt\[0\]: .*integer"),
    ],
)
def test_what_is_not_served_is_refused_in_one_line(served: Any, fields: dict[str, Any], message: str):
    with pytest.raises(openai.BadRequestError, match=message):
        complete(served, **fields)
