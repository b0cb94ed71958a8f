"""Each check of `longforge verify` can fail: one thing is broken at a time, and the check that is about it
goes red, and no other."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longforge.chat.parser import Delta
from longforge.engine import Engine, results
from longforge.engine.page_mover import PageMover
from longforge.engine.prefix_cache import PrefixCache
from longforge.engine.results import Results
from longforge.engine.runner import Runner
from longforge.engine.scheduler import Scheduler
from longforge.engine.sequence import Sequence
from longforge.engine.tiers import record
from longforge.engine.tiers.tiers import Tiers
from longforge.kernels.select_blocks import api
from longforge.model import CausalLM
from longforge.model.few_tokens import FewTokens
from longforge.server.anthropic.events import BlockEvents
from longforge.server.completion import Completion
from longforge.server.responses.events import ItemEvents
from longforge.verify import dialects, speculation
from longforge.verify.check import Check
from longforge.verify.speculation import CHAIN
from longforge.verify.subject import Subject, open_subject
from longforge.verify.verification import CHECKS, checks
from small_model import small_config, write_small_checkpoint

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("verify"), max_positions=1024)


@pytest.fixture
def subject(folder: Path, monkeypatch: Patch) -> Subject:
    monkeypatch.setattr(dialects, "ANSWER", 10)  # quick
    monkeypatch.setattr(speculation, "ANSWER", 8)
    return open_subject(folder, "cpu", "float32")


def outcome(subject: Subject) -> tuple[set[str], dict[str, str]]:
    """Names of the checks that failed, and all details."""
    told: list[Check] = list(checks(subject))
    assert [check.name for check in told] == [check.__name__ for check in CHECKS]
    return {check.name for check in told if not check.passed}, {c.name: c.detail for c in told}


def wrap(patch: Patch, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    patch.setattr(owner, name, make(getattr(owner, name)))


def wrong_page(patch: Patch) -> None:
    def make(find: Any) -> Any:
        def broken(*given: Any) -> list[int]:
            pages = find(*given)
            return [pages[-1], *pages[1:]] if pages else pages

        return broken

    wrap(patch, PrefixCache, "find", make)


def any_tenant(patch: Patch) -> None:
    for name in ("find", "add"):
        wrap(patch, PrefixCache, name, lambda old: lambda self, root, *rest: old(self, root[0], *rest))


def skipped_token(patch: Patch) -> None:
    def make(take: Any) -> Any:
        def broken(self: Results, spans: Any, *rest: Any) -> Any:
            taken = take(self, spans, *rest)
            for item, *_ in spans:
                item.sequence.computed += not item.samples  # between two chunks of a prompt
            return taken

        return broken

    wrap(patch, Results, "take", make)


def mixed_rows(patch: Patch) -> None:
    def make(run: Any) -> Any:
        def broken(self: Runner, stretches: Any, *rest: Any) -> Tensor:
            hidden = run(self, stretches, *rest)
            return hidden.roll(1, 0) if len(stretches) > 3 else hidden

        return broken

    wrap(patch, Runner, "run", make)


def accepts_everything(patch: Patch) -> None:
    patch.setattr(results, "accepted", lambda sampled, drafts: len(drafts))


def wrong_tails(patch: Patch) -> None:
    wrap(patch, Runner, "_keep_tails", lambda keep: lambda self, hidden, layout: keep(self, -hidden, layout))


def forgets_on_preemption(patch: Patch) -> None:
    def make(preempt: Any) -> Any:
        def broken(self: Scheduler, sequence: Sequence) -> None:
            preempt(self, sequence)
            sequence.ids[0] = 7

        return broken

    wrap(patch, Scheduler, "_preempt", make)


def another_record(patch: Patch) -> None:
    wrap(patch, Tiers, "load", lambda load: lambda self, keys, pages: load(self, keys, pages[::-1]))


def unseen_damage(patch: Patch) -> None:
    patch.setattr(record, "is_whole", lambda *given: True)
    patch.setattr(record, "_checksum", lambda *given: bytes(32))


def dropped_block(patch: Patch) -> None:
    def make(select: Any) -> Any:
        def broken(index_q: Tensor, pages: Tensor, layout: Any, top_k: int) -> Tensor:
            chosen = select(index_q, pages, layout, top_k)
            less = torch.cat([chosen[..., 1:], torch.full_like(chosen[..., :1], -1)], dim=-1)
            return torch.where(chosen[..., -1:] >= top_k, less, chosen)  # only where a choice is made

        return broken

    patch.setitem(api.BACKENDS, "cpu", make(api.BACKENDS["cpu"]))
    # The compiled step selects by itself; beside it the fault would show as a difference between the two.
    patch.setattr(FewTokens, "supports", staticmethod(lambda model: False))


def all_but_one(push: Any) -> Any:
    def broken(self: Any, deltas: Iterable[Delta]) -> Any:
        kept = list(deltas)
        for delta in kept:
            if delta.kind in ("content", "thinking") and delta.text and not vars(self).get("dropped"):
                vars(self)["dropped"] = True
                kept.remove(delta)
                break
        return push(self, kept)

    return broken


def messages_drop(patch: Patch) -> None:
    wrap(patch, BlockEvents, "push", all_but_one)


def responses_drop(patch: Patch) -> None:
    wrap(patch, ItemEvents, "push", all_but_one)


def completions_drop(patch: Patch) -> None:
    def make(chunks: Any) -> Any:
        async def broken(self: Completion) -> Any:
            async for choice in chunks(self):
                yield {**choice, "token_ids": choice["token_ids"][1:]}

        return broken

    wrap(patch, Completion, "chunks", make)


def lost_page(patch: Patch) -> None:
    def make(release: Any) -> Any:
        def broken(self: PrefixCache, pages: Iterable[int]) -> None:
            kept = list(pages)
            if kept and not self.pool.cached[kept[-1]] and not vars(self).get("lost"):
                vars(self)["lost"] = True
                kept.pop()
            release(self, kept)

        return broken

    wrap(patch, PrefixCache, "release", make)


def old_pages(patch: Patch) -> None:
    def adopt(self: Engine, sequence: Sequence) -> None:
        if self._caching and sequence.request.cache:
            sequence.root, sequence.page_keys = (0, sequence.request.tenant), []

    patch.setattr(Engine, "_adopt", adopt)
    patch.setattr(Engine, "reset_cache", lambda self: 0)


def old_versions(patch: Patch) -> None:
    event = results.TokenEvent
    patch.setattr(
        results, "TokenEvent", lambda name, token, logprob, _, *rest: event(name, token, logprob, 0, *rest)
    )


FAULTS: dict[Callable[[Patch], None], str] = {
    wrong_page: "cache_on_equals_cache_off",
    any_tenant: "cache_on_equals_cache_off",
    skipped_token: "chunked_equals_one_shot",
    mixed_rows: "batched_equals_alone",
    accepts_everything: "speculation_equals_plain",
    wrong_tails: "speculation_equals_plain",
    forgets_on_preemption: "preemption_equals_uninterrupted",
    another_record: "tiers_equal_memory",
    unseen_damage: "tiers_equal_memory",
    dropped_block: "selection_is_exact",
    messages_drop: "dialects_agree",
    responses_drop: "dialects_agree",
    completions_drop: "dialects_agree",
    lost_page: "pages_add_up",
    old_pages: "weights_have_versions",
    old_versions: "weights_have_versions",
}


@pytest.mark.parametrize(("break_it", "red"), FAULTS.items(), ids=[fault.__name__ for fault in FAULTS])
def test_what_is_broken_turns_its_own_check_red(
    subject: Subject, monkeypatch: Patch, break_it: Callable[[Patch], None], red: str
):
    break_it(monkeypatch)
    failed, details = outcome(subject)
    assert failed == {red}, details


def test_a_pass_over_several_tokens_that_is_off_is_seen_without_drafts(subject: Subject, monkeypatch: Patch):
    torch.manual_seed(0)
    subject.model = CausalLM(replace(small_config(max_positions=1024), mtp_modules=0)).eval()

    def make(run: Any) -> Any:
        def broken(self: Runner, stretches: Any, *rest: Any) -> Tensor:
            hidden = run(self, stretches, *rest)
            one = stretches[0]
            chain = len(stretches) == 1 and len(one.ids) == CHAIN and one.start % self.block_size
            return hidden * 1.01 if chain else hidden

        return broken

    wrap(monkeypatch, Runner, "run", make)
    failed, details = outcome(subject)
    assert failed == {"verify_equals_decode"}, details
    assert details["speculation_equals_plain"] == "no MTP module: nothing to compare"


@pytest.mark.parametrize("mixture", ["sparse", "sliding", "lightning"])
def test_a_sound_engine_passes_with_every_kind_of_layer(subject: Subject, mixture: str):
    torch.manual_seed(1)
    subject.model = CausalLM(small_config(mixture, max_positions=1024)).eval()
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    failed, details = outcome(subject)
    assert not failed, details
    after = subject.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and subject.model.version == 0


def test_a_context_too_short_for_a_chat_is_said(subject: Subject):
    torch.manual_seed(1)
    subject.model = CausalLM(small_config(max_positions=64)).eval()
    failed, details = outcome(subject)
    assert not failed and "no room for a chat" in details["dialects_agree"], details


def test_an_error_on_the_way_fails_its_check_and_the_others_go_on(subject: Subject, monkeypatch: Patch):
    def broken(self: PageMover, *given: object) -> list[int]:
        raise AssertionError("no page there")

    monkeypatch.setattr(PageMover, "restore", broken)
    failed, details = outcome(subject)
    assert failed == {"tiers_equal_memory"}
    assert details["tiers_equal_memory"] == "AssertionError: no page there"
