"""The prefix cache: what is found in it is what computing it again gives."""

from longforge.engine import Engine, TokenEvent
from longforge.verify.check import Check
from longforge.verify.compare import Comparison
from longforge.verify.drive import Asked, greedy, ids, request, run, sampled
from longforge.verify.subject import Subject

__all__ = ["cache_on_equals_cache_off"]

ANSWER = 4
"""Tokens of an answer."""
RUNNING = 3


def cache_on_equals_cache_off(subject: Subject) -> Check:
    """Hits of every length around page borders, a whole prompt, a next turn, and another tenant."""
    block = subject.block
    base = subject.tokens(subject.deep * block, 1)
    lengths = {1, len(base), *(place * block + d for place in (1, subject.deep - 1) for d in (-1, 0, 1))}
    asked: Asked = []
    for shared in sorted(lengths - {0}):
        for kind, params in (("greedy", greedy(ANSWER)), ("sampled", sampled(ANSWER, shared))):
            tail = subject.tokens(3, len(asked) + 100)
            asked.append(request(f"{kind} after {shared} shared tokens", base[:shared] + tail, params))
    asked.append(request("the same prompt again", base, greedy(ANSWER)))
    stranger = request("another tenant", base, greedy(ANSWER), tenant="another")
    talk = subject.prompt(4 * ANSWER)
    pages = RUNNING * (subject.deep + 4) + len(asked) * 3 + len(talk) // block
    found = Comparison(subject)
    with (
        subject.engine(pages=pages, max_running=RUNNING, prefix_cache=True) as hot,
        subject.engine(pages=pages, max_running=RUNNING) as cold,
    ):
        run(hot, [request("first", base, greedy(1))])
        answers = run(hot, asked)
        found.same(asked, answers, run(cold, asked))
        for one in asked:
            told = answers[one.id][0].cached_tokens
            shared = next(i for i, t in enumerate((*base, -1)) if t != (*one.prompt_ids, -2)[i])
            expected = min(shared, len(one.prompt_ids) - 1) // block * block
            found.expect(told == expected, f"{one.id}: {told} tokens found in the cache, not {expected}")
        told = run(hot, [stranger])[stranger.id][0].cached_tokens
        found.expect(told == 0, f"another tenant found {told} tokens of the first one's")
        hits = hot.stats().prefix_hit_tokens + _next_turn(subject, found, hot, cold, talk)
    return found.verdict("cache_on_equals_cache_off", f"{hits} prompt tokens came from the cache")


def _next_turn(
    subject: Subject, found: Comparison, hot: Engine, cold: Engine, prompt: tuple[int, ...]
) -> int:
    """A conversation whose last answer is part of the next prompt. Returns how many tokens were found."""
    turn = [request("first turn", prompt, greedy(ANSWER))]
    answer: list[TokenEvent] = run(hot, turn)["first turn"]
    again = [request("next turn", prompt + ids(answer) + subject.tokens(3, 7), greedy(ANSWER))]
    later = run(hot, again)
    found.same(again, later, run(cold, again))
    told = later["next turn"][0].cached_tokens
    expected = (len(prompt) + len(answer) - 1) // subject.block * subject.block  # the last one has no key yet
    found.expect(told == expected, f"next turn: {told} tokens found in the cache, not {expected}")
    return told
