"""The engine gives what the model alone would give, whatever else is in the batch, and never loses a page."""

import random

import pytest
import torch

from longforge.engine import Engine, GenerationRequest, TokenEvent
from longforge.errors import CheckpointError, ContextOverflow, EngineError, InputError
from longforge.model import CausalLM
from longforge.protocol import SamplingParams, StopReason
from small_model import small_model


def prompts(count: int, longest: int = 30) -> list[tuple[int, ...]]:
    draw = random.Random(5)
    return [tuple(draw.randrange(280) for _ in range(draw.randint(1, longest))) for _ in range(count)]


def drain(engine: Engine) -> dict[str, list[TokenEvent]]:
    answers: dict[str, list[TokenEvent]] = {}
    for _ in range(10_000):
        if not engine.has_work:
            engine.check_pages()
            stats = engine.stats()
            assert stats.free_pages + stats.cached_pages == stats.pages
            return answers
        for event in engine.step():
            answers.setdefault(event.request_id, []).append(event)
    raise AssertionError("the engine does not come to an end")


def generate(engine: Engine, prompt: tuple[int, ...], params: SamplingParams) -> list[TokenEvent]:
    engine.submit(GenerationRequest("one", prompt, params))
    return drain(engine)["one"]


def ids(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


def full_logprobs(model: CausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens]))[0], dim=-1)


@pytest.mark.parametrize("mixture", ["sparse", "sliding", "lightning"])
def test_a_mixed_batch_in_small_chunks_equals_each_request_alone(mixture: str):
    model = small_model(mixture)
    asked = [
        (prompt, SamplingParams(max_tokens=3 + i, temperature=(i % 3) * 0.6, top_k=(i % 2) * 20, seed=i))
        for i, prompt in enumerate(prompts(9))
    ]
    batched = Engine(model, pages=40, max_running=4, max_batch_tokens=7)
    for i, (prompt, params) in enumerate(asked):
        batched.submit(GenerationRequest(str(i), prompt, params))
    together = drain(batched)
    for i, (prompt, params) in enumerate(asked):
        alone = generate(Engine(model, pages=24, max_running=1), prompt, params)
        assert ids(together[str(i)]) == ids(alone)
        assert together[str(i)][-1].stop_reason is StopReason.LENGTH
        torch.testing.assert_close(
            [e.logprob for e in together[str(i)]], [e.logprob for e in alone], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("mixture", ["sparse", "sliding", "lightning"])
def test_greedy_tokens_and_logprobs_equal_the_full_forward(mixture: str):
    model = small_model(mixture)
    prompt = prompts(1)[0]
    events = generate(
        Engine(model, pages=24, max_batch_tokens=5, max_running=2),
        prompt,
        SamplingParams(max_tokens=20, temperature=0.0, top_logprobs=2),
    )
    full = full_logprobs(model, [*prompt, *ids(events)])
    for place, event in enumerate(events, start=len(prompt) - 1):
        best, runner_up = full[place].sort(descending=True, stable=True)[1][:2].tolist()
        assert event.token_id == best
        assert [token for token, _ in event.top_logprobs] == [best, runner_up]
        assert event.logprob == pytest.approx(float(full[place, best]), abs=1e-5)
        assert event.top_logprobs[1][1] == pytest.approx(float(full[place, runner_up]), abs=1e-5)


def test_logprobs_of_sampled_tokens_are_the_models_at_temperature_one():
    model = small_model()
    prompt = prompts(1)[0]
    events = generate(
        Engine(model, pages=24), prompt, SamplingParams(max_tokens=12, temperature=1.7, top_p=0.8, seed=3)
    )
    full = full_logprobs(model, [*prompt, *ids(events)])
    for place, event in enumerate(events, start=len(prompt) - 1):
        assert event.logprob == pytest.approx(float(full[place, event.token_id]), abs=1e-5)


def test_seeds_decide_and_no_seed_is_a_fresh_one():
    engine = Engine(small_model(), pages=24)
    prompt, fixed = prompts(1)[0], SamplingParams(max_tokens=12, seed=1)
    assert ids(generate(engine, prompt, fixed)) == ids(generate(engine, prompt, fixed))
    assert ids(generate(engine, prompt, fixed)) != ids(generate(engine, prompt, SamplingParams(12, seed=2)))
    free = SamplingParams(max_tokens=12)
    assert ids(generate(engine, prompt, free)) != ids(generate(engine, prompt, free))


def test_a_stop_token_ends_the_answer_and_is_reported():
    engine = Engine(small_model(), pages=24)
    prompt, greedy = prompts(1)[0], SamplingParams(max_tokens=12, temperature=0.0)
    plain = ids(generate(engine, prompt, greedy))
    stop = plain[4]
    stopped = generate(engine, prompt, SamplingParams(12, temperature=0.0, stop_token_ids=(stop,)))
    assert ids(stopped) == plain[: plain.index(stop) + 1]
    assert [e.stop_reason for e in stopped[:-1]] == [None] * (len(stopped) - 1)
    assert stopped[-1].stop_reason is StopReason.STOP


def test_an_answer_ends_where_the_context_is_full():
    model = small_model(max_positions=32)
    events = generate(Engine(model, pages=50), (1,) * 27, SamplingParams(max_tokens=100))
    assert (len(events), events[-1].stop_reason) == (5, StopReason.LENGTH)
    assert len(generate(Engine(model, pages=50), (1,) * 31, SamplingParams(max_tokens=100))) == 1


@pytest.mark.parametrize(("tokens", "named"), [(32, 33), (40, 40)])
def test_a_prompt_over_the_context_is_refused_with_both_numbers(tokens: int, named: int):
    engine = Engine(small_model(max_positions=32), pages=50)
    with pytest.raises(ContextOverflow, match=f"at most 32 tokens.*got {named}"):
        engine.submit(GenerationRequest("long", (1,) * tokens))
    assert not engine.has_work


def test_a_small_pool_bounds_the_context_so_that_every_accepted_request_can_run():
    engine = Engine(small_model(), pages=3)
    assert engine.context == 12
    assert len(generate(engine, (5,) * 8, SamplingParams(max_tokens=50))) == 4


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), SamplingParams(), "prompt: expected at least 1 token"),
        ((3, 9999), SamplingParams(), "got 9999"),
        ((3, -1), SamplingParams(), "got -1"),
        ((3,), SamplingParams(max_tokens=0), "max_tokens"),
        ((3,), SamplingParams(temperature=float("nan")), "temperature"),
        ((3,), SamplingParams(temperature=-0.1), "temperature"),
        ((3,), SamplingParams(top_p=0.0), "top_p"),
        ((3,), SamplingParams(top_k=-1), "top_k"),
        ((3,), SamplingParams(top_logprobs=-1), "top_logprobs"),
    ],
)
def test_what_can_never_run_is_refused_by_name(prompt: tuple[int, ...], params: SamplingParams, message: str):
    engine = Engine(small_model(), pages=4)
    with pytest.raises(InputError, match=message):
        engine.submit(GenerationRequest("bad", prompt, params))
    assert not engine.has_work


def test_an_id_in_use_is_refused():
    engine = Engine(small_model(), pages=4)
    engine.submit(GenerationRequest("a", (1,)))
    with pytest.raises(InputError, match="request id"):
        engine.submit(GenerationRequest("a", (1,)))


def test_cancelling_at_any_moment_returns_the_pages_and_leaves_the_others_alone():
    model = small_model()
    asked = prompts(8)
    params = SamplingParams(max_tokens=9, seed=4)
    alone = [ids(generate(Engine(model, pages=24), prompt, params)) for prompt in asked]
    draw = random.Random(1)
    for _ in range(6):
        engine = Engine(model, pages=30, max_running=3, max_batch_tokens=6)
        for i, prompt in enumerate(asked):
            engine.submit(GenerationRequest(str(i), prompt, params))
        doomed = {str(i): draw.randint(0, 30) for i in draw.sample(range(8), 4)}
        answers: dict[str, list[int]] = {}
        cancelled = set()
        for step in range(500):
            for name, moment in doomed.items():
                if moment == step and engine.cancel(name):
                    cancelled.add(name)
                    engine.check_pages()
            if not engine.has_work:
                break
            for event in engine.step():
                assert event.request_id not in cancelled
                answers.setdefault(event.request_id, []).append(event.token_id)
        engine.check_pages()
        assert not engine.stats().running and engine.stats().cancelled == len(cancelled)
        for i, expected in enumerate(alone):
            if str(i) not in cancelled:
                assert answers[str(i)] == expected
    assert not engine.cancel("nobody")


def test_new_weights_in_mid_answer_mark_each_token_with_its_version():
    model, other = small_model(seed=0), small_model(seed=1)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    engine = Engine(model, pages=24)
    engine.submit(GenerationRequest("a", (1, 2, 3), SamplingParams(max_tokens=6, temperature=0.0)))
    events = [*engine.step(), *engine.step()]
    engine.swap_weights(state, version=7)
    while engine.has_work:
        events += engine.step()
    assert [e.version for e in events] == [0, 0, 7, 7, 7, 7]
    assert engine.version == engine.stats().version == 7
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    assert ids(generate(engine, (1, 2, 3), greedy)) == ids(
        generate(Engine(other, pages=24), (1, 2, 3), greedy)
    )


def _broken(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    last = list(state)[-1]
    changed = {name: tensor + 1 for name, tensor in state.items()}
    if how == "missing":
        del changed[last]
    elif how == "unknown":
        changed["extra.weight"] = torch.zeros(1)
    elif how == "shape":
        changed[last] = changed[last][..., :-1]
    else:
        changed[last] = torch.full_like(changed[last], float("nan"))
    return changed


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "1 of .* missing"),
        ("unknown", "extra.weight"),
        ("shape", "expected shape"),
        ("nan", "NaN"),
    ],
)
def test_a_failed_swap_changes_nothing(how: str, message: str):
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = Engine(model, pages=24)
    with pytest.raises(CheckpointError, match=message):
        engine.swap_weights(_broken(before, how), version=1)
    assert engine.version == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_version_never_goes_back_or_repeats():
    engine = Engine(small_model(), pages=24)
    state = {name: tensor.clone() for name, tensor in small_model().state_dict().items()}
    engine.swap_weights(state, version=3)
    for version in (3, 2):
        with pytest.raises(EngineError, match=f"more than the active 3, got {version}"):
            engine.swap_weights(state, version=version)


def test_warm_up_leaves_no_trace():
    engine = Engine(small_model(), pages=24)
    engine.warm_up()
    stats = engine.stats()
    assert not engine.has_work and stats.free_pages == 24
    assert (stats.steps, stats.finished, stats.generated_tokens, stats.cancelled) == (0, 0, 0, 0)
