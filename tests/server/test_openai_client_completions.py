"""Completions, every field, asked by the official client, streaming and not."""

from typing import Any

import pytest
import torch

PROMPT = [5, 9, 2, 11, 7]
IDS = {"return_token_ids": True}


def complete(served: Any, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"model": "small", "prompt": PROMPT, "max_tokens": 6, "seed": 1, **fields}
    return served.client.completions.create(**fields, extra_body=extra or {})


def test_several_prompts_are_answered_in_order(served: Any):
    prompts = ["class A", "def read", "☕"]
    answer = complete(served, IDS, prompt=prompts, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    for place, prompt in enumerate(prompts):
        alone = complete(served, IDS, prompt=prompt, n=2)
        both = answer.choices[2 * place : 2 * place + 2]
        assert [choice.token_ids for choice in both] == [choice.token_ids for choice in alone.choices]
        assert {tuple(choice.prompt_token_ids) for choice in both} == {tuple(served.tokenizer.encode(prompt))}
    assert answer.usage.prompt_tokens == sum(len(served.tokenizer.encode(prompt)) for prompt in prompts)
    assert answer.usage.completion_tokens == sum(len(choice.token_ids) for choice in answer.choices)


def test_lists_of_ids_are_prompts_too(served: Any):
    answer = complete(served, IDS, prompt=[[1, 2], [3]])
    assert [choice.prompt_token_ids for choice in answer.choices] == [[1, 2], [3]]


def test_streamed_answers_carry_their_index_and_add_up(served: Any):
    fields = {"prompt": [[1, 2], [3]], "n": 2, "logprobs": 1}
    whole = complete(served, IDS, **fields)
    chunks = list(complete(served, IDS, **fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert [value for c in mine for value in c.token_ids] == choice.token_ids
        assert "".join(c.text for c in mine) == choice.text
        assert [value for c in mine for value in c.logprobs.text_offset] == choice.logprobs.text_offset
        assert mine[-1].finish_reason == choice.finish_reason


def test_offsets_are_where_a_tokens_text_begins(served: Any):
    choice = complete(served, IDS, logprobs=0, max_tokens=30).choices[0]
    whole = served.tokenizer.decode(choice.token_ids)
    offsets = choice.logprobs.text_offset
    assert offsets[0] == 0 and offsets == sorted(offsets)
    for token, offset in zip(choice.token_ids, offsets, strict=True):
        text = served.tokenizer.decode([token])
        if "\ufffd" not in text and "\ufffd" not in whole:
            assert whole[offset : offset + len(text)] == text


def test_echo_gives_the_prompt_back_before_the_answer(served: Any):
    plain = complete(served, prompt="class A")
    for stream in (False, True):
        echoed = complete(served, prompt="class A", echo=True, stream=stream)
        parts = [chunk.choices[0].text for chunk in echoed] if stream else [echoed.choices[0].text]
        assert "".join(parts) == "class A" + plain.choices[0].text


def test_echo_of_the_prompt_alone_samples_nothing(served: Any):
    answer = complete(served, IDS, prompt="class A", echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].token_ids) == ("class A", [])
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("limit", [0, 1])
def test_the_prompts_own_logprobs_are_the_models(served: Any, limit: int):
    """What evaluation harnesses ask for to rate a given text."""
    prompt = served.tokenizer.encode("class A: café")
    choice = complete(served, prompt=prompt, echo=True, max_tokens=limit, logprobs=1, temperature=0).choices[
        0
    ]
    with torch.no_grad():
        rows = torch.log_softmax(served.model(torch.tensor([prompt]))[0], dim=-1)
    expected = rows[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])].tolist()
    logprobs = choice.logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1 : len(prompt)] == pytest.approx(expected, abs=1e-4)
    assert len(logprobs.tokens) == len(prompt) + limit
    assert logprobs.text_offset[: len(prompt)][0] == 0
    for place in range(1, len(prompt)):
        best = max(logprobs.top_logprobs[place], key=logprobs.top_logprobs[place].__getitem__)
        assert (best == logprobs.tokens[place]) == (rows[place - 1].argmax().item() == prompt[place])


def test_a_tokens_version_is_told(served: Any):
    choice = complete(served, n=2).choices[1]
    assert choice.weight_versions == [served.loop.engine.version] * 6
