"""How differences are judged: equal, a tie within rounding, or a fault with its place."""

import pytest
import torch

from longforge.engine import TokenEvent
from longforge.engine.sampler import Row, law
from longforge.kernels.layout import PackedLayout
from longforge.protocol import SamplingParams, StopReason
from longforge.verify.check import Check, as_document, as_line, passed, verdict
from longforge.verify.compare import Comparison
from longforge.verify.drive import greedy, request, sampled
from longforge.verify.subject import Subject, rounding_of
from small_model import small_model, small_tokenizer

PROMPT = (3, 1, 4, 1, 5, 9)
ENDED = StopReason.LENGTH


@pytest.fixture
def subject() -> Subject:
    return Subject(small_model(), small_tokenizer(), "small", [], (), rounding_of(torch.float32))


def event(token: int, *told: float, stop: StopReason | None = None) -> TokenEvent:
    """A place where tokens 0, 1, ... have the log-probabilities `told`."""
    return TokenEvent("a", token, told[token], 0, tuple(enumerate(told)), stop)


def judged(subject: Subject, way: list[TokenEvent], other: list[TokenEvent]) -> Check:
    found = Comparison(subject)
    found.same([request("a", PROMPT, greedy(9))], {"a": way}, {"a": other})
    return found.verdict("some_check")


def test_equal_answers_pass_and_say_how_far_apart_they_were(subject: Subject):
    way = [event(0, -0.1, -2.5), event(1, -3.0, -0.2, stop=ENDED)]
    other = [event(0, -0.1, -2.50001), event(1, -3.0, -0.2, stop=ENDED)]
    check = judged(subject, way, other)
    assert check.passed and "1 answers, 2 tokens equal" in check.detail and "1.0e-05" in check.detail


def test_another_token_fails_with_its_place(subject: Subject):
    way = [event(0, -0.1, -2.5), event(0, -0.3, -2.0, stop=ENDED)]
    other = [event(0, -0.1, -2.5), event(1, -0.3, -2.0, stop=ENDED)]
    check = judged(subject, way, other)
    assert not check.passed and check.detail.startswith("a, token 1: 0 and 1, 1.7e+00 apart")


def test_a_tie_within_the_measured_noise_passes_and_is_told(subject: Subject):
    way = [event(0, -0.5, -0.500_01), event(0, -1.0, -2.0, stop=ENDED)]
    other = [event(1, -0.500_01, -0.5), event(1, -2.0, -1.0, stop=ENDED)]
    check = judged(subject, way, other)
    assert check.passed and "tie within rounding at a, token 0" in check.detail


def test_a_difference_beyond_the_dtype_is_no_noise(subject: Subject):
    way, other = [event(0, -0.5, -0.6, stop=ENDED)], [event(1, -0.6, -0.5, stop=ENDED)]
    assert not judged(subject, way, other).passed
    same = [event(0, -0.55, -0.6, stop=ENDED)]
    assert "log-probabilities differ by 5.0e-02" in judged(subject, way, same).detail


def test_numbers_that_are_none_fail(subject: Subject):
    way = [event(0, float("nan"), -0.6, stop=ENDED)]
    assert not judged(subject, way, [event(0, -0.5, -0.6, stop=ENDED)]).passed


def test_an_answer_that_ends_early_or_otherwise_fails(subject: Subject):
    whole = [event(0, -0.5, -2.0), event(0, -0.5, -2.0, stop=ENDED)]
    assert not judged(subject, whole, whole[:1]).passed
    assert not judged(subject, whole, []).passed
    stopped = [whole[0], event(0, -0.5, -2.0, stop=StopReason.STOP)]
    assert "ends differ" in judged(subject, whole, stopped).detail


def test_a_sampled_tie_needs_the_draw_at_the_border_of_both_tokens(subject: Subject):
    model = subject.model
    with torch.inference_mode():
        layout = PackedLayout.from_lengths([len(PROMPT)], model.config.block_size)
        logits = model.logits(model.forward_packed(torch.tensor(PROMPT), layout).hidden[-1])
    likely = law(logits, Row(SamplingParams(), 0, 0)).argsort()[::-1]
    far = [int(likely[0]), int(likely[1])]
    outcomes = []
    for seed in range(40):
        found = Comparison(subject)
        found.subject.tolerance = 1e-2
        asked = request("a", PROMPT, sampled(9, seed))
        ways = [
            {"a": [TokenEvent("a", token, -1.0, 0, ((0, noise),), ENDED)]}
            for token, noise in zip((min(far), min(far) + 1), (-2.0, -2.009), strict=True)
        ]
        found.same([asked], *ways)
        outcomes.append(found.verdict("some_check").passed)
    assert any(outcomes) and not all(outcomes), "only seeds whose draw is near that border are ties"


def test_the_tolerance_follows_the_dtype():
    assert rounding_of(torch.float32) < 1e-3 < rounding_of(torch.bfloat16) < 0.5


def test_the_verdict_names_what_failed():
    good, bad = Check("one", True, "fine"), Check("two", False, "3 and 4 differ")
    assert passed([good]) and not passed([good, bad]) and not passed([])
    assert verdict([good, bad]) == "failed: two" and verdict([good]).startswith("passed: 1 checks")
    assert as_line(bad).startswith("FAIL  two") and as_line(bad).endswith("3 and 4 differ")
    document = as_document([good, bad], {"model": "m"})
    assert document["passed"] is False and document["model"] == "m"
    assert document["checks"][1] == {"name": "two", "passed": False, "detail": "3 and 4 differ"}
