"""Speculative decoding changes how many steps an answer takes and nothing else."""

import itertools
import random
from functools import cache, partial

import pytest
import torch

from longforge.engine import Engine, GenerationRequest, TokenEvent
from longforge.engine.draft_costs import PLAIN
from longforge.engine.draft_length import DraftCosts, best_length, expected_tokens
from longforge.engine.drafts import LOOKS, RETRY_EVERY, Drafter
from longforge.engine.grammar import Grammars
from longforge.engine.runner import Runner, Stretch
from longforge.engine.scheduler import Work
from longforge.engine.sequence import Sequence
from longforge.errors import InputError
from longforge.model import CausalLM, shipped
from longforge.protocol import Grammar, SamplingParams
from small_engine import ids, one, run, tokens
from small_model import small_model, small_tokenizer

FREE = DraftCosts(rows=(1,), step=(1.0,), draft=(0.0,))
"""Guesses cost nothing: as many as allowed are always made."""

PARAMS = [
    SamplingParams(max_tokens=25, temperature=0.0),
    SamplingParams(max_tokens=25, temperature=1.0, seed=1),
    SamplingParams(max_tokens=25, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, seed=2),
    SamplingParams(
        max_tokens=25,
        temperature=0.9,
        presence_penalty=1.1,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        seed=3,
    ),
    SamplingParams(max_tokens=25, grammar=Grammar("regex", "(a|b|Which|read){4,}"), seed=5),
    SamplingParams(
        max_tokens=25, logit_bias=((4, 3.0), (9, -100.0)), min_tokens=20, stop_token_ids=(4, 5), seed=4
    ),
]


@cache
def grammars() -> Grammars:
    return Grammars(small_tokenizer(), small_tokenizer().vocab_size)


@cache
def micro() -> CausalLM:
    return CausalLM.from_pretrained(shipped.path(), dtype=torch.float32)


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "plain", "filters", "penalties", "grammar", "bias"])
def test_tokens_are_those_of_plain_decoding(drafts: int, params: SamplingParams):
    model = small_model()
    for length in (3, 4, 5, 8, 9):
        prompt = tokens(length, length)
        plain = one(Engine(model, pages=24, grammars=grammars()), prompt, params)
        engine = Engine(model, pages=24, drafts=drafts, draft_costs=FREE, grammars=grammars())
        drafted = one(engine, prompt, params)
        assert ids(drafted) == ids(plain)
        assert [e.stop_reason for e in drafted] == [e.stop_reason for e in plain]
        torch.testing.assert_close(
            [e.logprob for e in drafted], [e.logprob for e in plain], atol=1e-5, rtol=0
        )
        assert engine.stats().drafted_tokens > 0


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_the_shipped_module_guesses_well_and_its_guesses_save_steps(drafts: int):
    """On the model's own repetitive text, where guessing is easy; the tokens stay the same."""
    prompt = tuple(random.Random(0).choices(range(300, 330), k=6)) * 9
    params = SamplingParams(max_tokens=60, temperature=0.0)
    plain = Engine(micro(), pages=60)
    expected = one(plain, prompt, params)
    engine = Engine(micro(), pages=60, drafts=drafts, draft_costs=FREE)
    assert ids(one(engine, prompt, params)) == ids(expected)
    stats = engine.stats()
    assert stats.accepted_tokens > 5 and stats.steps == plain.stats().steps - stats.accepted_tokens
    assert sum(stats.accepted_by_place) == stats.accepted_tokens


def test_a_mixed_batch_with_drafts_and_a_cache_equals_each_request_alone():
    model = small_model()
    asked = [
        GenerationRequest(str(i), tokens(2 + 3 * (i % 4), i % 3) + tokens(i, i), PARAMS[i % len(PARAMS)])
        for i in range(10)
    ]
    engine = Engine(
        model, pages=50, max_running=4, max_batch_tokens=9, drafts=3, draft_costs=FREE, grammars=grammars()
    )
    for _ in range(2):  # the second time everything is found
        together = run(engine, *asked)
        for request in asked:
            alone = one(
                Engine(model, pages=24, max_running=1, grammars=grammars()),
                request.prompt_ids,
                request.params,
            )
            assert ids(together[request.id]) == ids(alone)


@pytest.mark.parametrize("drafts", [0, 2])
def test_cancelling_at_any_stage_gives_the_pages_back_at_once(drafts: int):
    """Queued, in mid-prompt, decoding, verifying: whatever the request is doing, its pages are back."""
    model = small_model()
    for moment in range(12):
        engine = Engine(model, pages=20, max_running=1, max_batch_tokens=6, drafts=drafts, draft_costs=FREE)
        for name in ("first", "second"):
            engine.submit(GenerationRequest(name, tokens(14, 3), SamplingParams(max_tokens=20)))
        for _ in range(moment):
            engine.step()
        for name in ("first", "second"):
            engine.cancel(name)
            engine.check_pages()
        stats = engine.stats()
        assert not engine.has_work and stats.free_pages + stats.cached_pages == 20
        assert engine.step() == []


def test_a_model_without_what_drafting_needs_says_so():
    with pytest.raises(InputError, match="state cannot be taken back"):
        Engine(small_model("lightning"), pages=9, drafts=1)
    with pytest.raises(InputError, match="drafts: expected 0 to 3, got 4"):
        Engine(small_model(), pages=9, drafts=4)


def test_the_number_of_guesses_follows_what_they_are_worth():
    costs = DraftCosts(rows=(1, 4), step=(1.0, 1.6), draft=(0.2, 0.3))
    lengths = [best_length(a, partial(costs.seconds, 1), 3) for a in (0.0, 0.3, 0.6, 0.9, 0.99)]
    assert lengths == sorted(lengths) and lengths[0] == 0 and lengths[-1] == 3
    dear = DraftCosts(rows=(1, 4), step=(1.0, 4.0), draft=(0.5, 2.0))
    assert best_length(0.9, partial(dear.seconds, 1), 3) == 0
    assert best_length(1.0, partial(costs.seconds, 1), 0) == 0
    for acceptance, length in itertools.product((0.0, 0.5, 0.9), range(4)):
        closed_form = (1 - acceptance ** (length + 1)) / (1 - acceptance)
        assert expected_tokens(acceptance, length) == pytest.approx(closed_form)


def test_who_guesses_badly_stops_guessing_and_tries_again_now_and_then():
    engine = Engine(small_model(max_positions=512), pages=130, drafts=2)  # random weights: hardly ever right
    one(engine, tokens(5, 1), SamplingParams(max_tokens=300, temperature=1.0, seed=1))
    stats = engine.stats()
    assert 5 < stats.drafts < 60


def test_a_disturbed_step_does_not_end_a_number_of_guesses_for_good():
    drafter = Drafter(one_runner(), 3, DraftCosts(), observe=True)

    def step(guesses: int, seconds: float) -> None:
        sequence = running(guesses)
        drafter.saw([Work(sequence, 1, sequence.drafts, True)], seconds)

    for _ in range(LOOKS + 2):
        for guesses, seconds in ((0, 1.0), (2, 1.7), (3, 2.0)):
            step(guesses, seconds)
    assert chosen(drafter, 40).count(3) >= 35  # four tokens in 2.0 are worth more than three in 1.7
    for _ in range(12):
        step(3, 8.0)  # somebody else's minute
    after = chosen(drafter, 3 * RETRY_EVERY)
    assert 2 in after and 3 in after
    for _ in range(12):
        step(3, 2.0)
    assert chosen(drafter, 40).count(3) >= 35


def one_runner() -> Runner:
    return Runner(small_model(), pages=4, max_running=1, context=64, drafts=3)


def running(guesses: int) -> Sequence:
    """A request that generates, whose guesses have always been right."""
    sequence = Sequence(GenerationRequest("one", (1, 2)), limit=100, seed=0, arrival=0)
    sequence.append(3)
    sequence.drafts = (1,) * guesses
    sequence.drafting.acceptance = 1.0
    return sequence


def chosen(drafter: Drafter, requests: int) -> list[int]:
    """The first number of guesses for each of so many requests, alone."""
    return [drafter._length(running(0), 1) for _ in range(requests)]


def test_drafted_events_come_in_order_and_the_last_one_ends_the_request():
    engine = Engine(micro(), pages=60, drafts=3, draft_costs=FREE)
    prompt = tuple(random.Random(0).choices(range(300, 330), k=6)) * 9
    engine.submit(GenerationRequest("one", prompt, SamplingParams(max_tokens=50, temperature=0.0)))
    batches = []
    while engine.has_work:
        batches.append(engine.step())
    assert max(len(batch) for batch in batches) > 1
    events = [event for batch in batches for event in batch if isinstance(event, TokenEvent)]
    assert len(events) == 50 and [bool(e.stop_reason) for e in events] == [False] * 49 + [True]


def test_what_waits_for_the_draft_module_keeps_no_large_steps_hidden_states():
    engine = Engine(small_model(max_positions=512), pages=140, drafts=1, draft_costs=PLAIN)
    engine.submit(GenerationRequest("short", tokens(3, 1), SamplingParams(max_tokens=20)))
    engine.submit(GenerationRequest("long", tokens(401, 2), SamplingParams(max_tokens=20)))
    engine.step()
    short = engine._scheduler.running[0].drafting.pending
    assert len(short) == 2 and short[-1].untyped_storage().nbytes() == 3 * 24 * 4


def test_logits_that_were_known_are_not_those_of_guesses_made_since():
    """A compiled step and compiled guesses write their logits to the same memory."""
    model = small_model()
    runner = Runner(model, pages=9, max_running=1, context=36, drafts=2)
    sequence = Sequence(GenerationRequest("one", (5, 6, 7), PARAMS[0]), limit=30, seed=0, arrival=1)
    sequence.row, sequence.pages = 0, list(range(9))
    runner.show_pages(sequence, 0)
    stretches, places = [Stretch(sequence, 0, [5, 6, 7])], [1, 2]
    hidden = runner.run(stretches, places)
    expected = runner.logits_at(hidden, places).clone()
    runner.guess(stretches, [torch.zeros(3, model.config.hidden_size)], [2])
    torch.testing.assert_close(runner.logits_at(hidden, places), expected)
