"""The trainer: edges where the policy chose, the formula's loss, resuming bit for bit."""

import random
from dataclasses import replace

import pytest
import torch

from longforge.forge.batching import make_batch, micro_batches
from longforge.forge.config import TrainerConfig
from longforge.forge.trainer import Trainer
from longforge.protocol import Call, Episode, Group
from small_model import small_model

CONFIG = TrainerConfig(steps=5, learning_rate=1e-2, warmup_steps=0, micro_batch_tokens=50, index_loss=0.1)


def make_groups(seed: int, groups: int = 2, size: int = 3, version: int = 0) -> list[Group]:
    """Groups whose first episode succeeds; two calls each, lengths all different and odd."""
    rng = random.Random(seed)

    def call(episode_id: str, index: int) -> Call:
        n, prompt = rng.randint(1, 6), rng.randint(1, 23)
        return Call(
            f"{episode_id}#{index}",
            episode_id,
            index,
            tuple(rng.randrange(290) for _ in range(prompt)),
            tuple(rng.randrange(290) for _ in range(n)),
            tuple(-5.0 - rng.random() for _ in range(n)),
            (version,) * n,
            "stop",
        )

    made = []
    for g in range(groups):
        names = [f"s{seed}g{g}/{e}" for e in range(size)]
        episodes = [
            Episode(name, f"s{seed}g{g}", {}, (call(name, 0), call(name, 1)), float(e == 0), "answered")
            for e, name in enumerate(names)
        ]
        made.append(Group(f"s{seed}g{g}", g, tuple(episodes)))
    return made


def grown(groups: list[Group]) -> list[Group]:
    """Groups as agents make them: one question for all, and each call goes on where the one before ended."""
    made = []
    for group in groups:
        question, episodes = tuple(range(17)), []
        for episode in group.episodes:
            first = replace(episode.calls[0], prompt_ids=question)
            prompt = question + first.sampled_ids + episode.calls[1].prompt_ids
            calls = (first, replace(episode.calls[1], prompt_ids=prompt))
            episodes.append(replace(episode, calls=calls))
        made.append(replace(group, episodes=tuple(episodes)))
    return made


def pack_all(groups, max_tokens=10_000, **options):
    return list(micro_batches(make_batch(groups).samples, max_tokens, 4, **options))


def test_edges_are_the_rows_that_sampled_and_weights_are_the_token_mean():
    groups = make_groups(0)
    batch = make_batch(groups)
    pieces = pack_all(groups, 40)
    assert len(pieces) > 1 and all(len(p.ids) <= 40 or len(p.lengths) == 1 for p in pieces)
    seen = {}
    for piece in pieces:
        layout = piece.layout
        place = 0
        for row, target, weight in zip(*(t.tolist() for t in vars(piece.edges).values()), strict=True):
            path = int(layout.paths[row])
            seen.setdefault((id(piece), path), []).append((int(layout.positions[row]), target))
            assert weight == pytest.approx(1 / batch.sampled_tokens)
            place += 1
        assert place == len(piece.old_logprobs) == len(piece.advantages) == len(piece.versions)
    calls = [c for group in groups for e in group.episodes for c in e.calls]
    expected = [[(len(c.prompt_ids) - 1 + i, t) for i, t in enumerate(c.sampled_ids)] for c in calls]
    assert sorted(seen.values()) == sorted(expected), "each call once, every token of it from its own row"
    assert batch.sampled_tokens == sum(len(c.sampled_ids) for c in calls)


def test_the_sampled_mask_marks_fed_tokens_of_the_policy():
    (piece,) = pack_all(make_groups(1, groups=1))
    calls = {
        c.prompt_ids + c.sampled_ids[:-1]: c for e in make_groups(1, groups=1)[0].episodes for c in e.calls
    }
    for ids, mask in zip(piece.ids.split(piece.lengths), piece.sampled.split(piece.lengths), strict=True):
        call = calls[tuple(ids.tolist())]
        assert mask.tolist() == [0.0] * len(call.prompt_ids) + [1.0] * (len(call.sampled_ids) - 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_tokens", [60, 10_000])
def test_common_beginnings_are_packed_once_and_every_edge_keeps_its_context(seed, max_tokens):
    groups = grown(make_groups(seed))
    pieces = pack_all(groups, max_tokens)
    found, marked = [], set()
    for piece in pieces:
        layout = piece.layout
        row_of = {slot: row for row, slot in enumerate(layout.slots.tolist())}
        assert len(row_of) == len(piece.ids), "no two rows write to one slot"
        paths = [
            [row_of[int(layout.page_table[path, at // 4]) * 4 + at % 4] for at in range(length)]
            for path, length in enumerate(piece.lengths)
        ]
        edge = 0
        for rows in paths:
            ids = tuple(piece.ids[rows].tolist())
            while edge < len(piece.edges.rows) and int(piece.edges.rows[edge]) in rows:
                at = rows.index(int(piece.edges.rows[edge]))
                numbers = (piece.edges.weights, piece.advantages, piece.old_logprobs)
                target = int(piece.edges.targets[edge])
                found.append((ids[: at + 1], target, *(round(float(x[edge]), 3) for x in numbers)))
                edge += 1
                if at + 1 == len(rows):
                    break
            marked |= {ids[: at + 1] for at in range(len(ids)) if piece.sampled[rows[at]]}
        assert edge == len(piece.edges.rows)
    expected, said = [], set()
    for sample in make_batch(groups).samples:
        prompt = sample.call.prompt_ids
        for i, (token, old) in enumerate(zip(sample.call.sampled_ids, sample.call.logprobs, strict=True)):
            context = prompt + sample.call.sampled_ids[:i]
            numbers = (sample.weight, sample.advantage, old)
            expected.append((context, token, *(round(x, 3) for x in numbers)))
            said |= {context} if i else set()
    assert sorted(found) == sorted(expected)
    assert said <= marked
    whole = sum(len(p.ids) for p in pack_all(groups, max_tokens, share=False))
    assert sum(len(p.ids) for p in pieces) < 0.75 * whole


def test_groups_can_weigh_the_same():
    groups = make_groups(2)
    batch = make_batch(groups, mean_over="group")
    for group in groups:
        mine = [s for s in batch.samples if s.call.episode_id.startswith(group.group_id)]
        assert sum(s.weight * len(s.call.sampled_ids) for s in mine) == pytest.approx(0.5)


def test_calls_without_advantage_are_not_computed_but_count_in_the_mean():
    (group,) = make_groups(3, groups=1, size=4)
    rewards = (1.0, 0.0, 0.5, 0.5)
    episodes = tuple(replace(e, reward=r) for e, r in zip(group.episodes, rewards, strict=True))
    batch = make_batch([replace(group, episodes=episodes)])
    assert {s.call.episode_id for s in batch.samples} == {e.episode_id for e in episodes[:2]}
    assert batch.calls == 8
    assert batch.sampled_tokens == sum(len(c.sampled_ids) for e in episodes for c in e.calls)


def one_sample_loss(model, groups, config):
    """CISPO by hand: every call alone through the public forward, log-softmax, clipped weight."""
    total = sum(len(c.sampled_ids) for g in groups for e in g.episodes for c in e.calls)
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        mean = sum(e.reward for e in group.episodes) / len(group.episodes)
        for episode in group.episodes:
            for call in episode.calls:
                ids = torch.tensor([call.prompt_ids + call.sampled_ids])
                logs = torch.log_softmax(model(ids)[0].double(), -1)
                for i, (token, old) in enumerate(zip(call.sampled_ids, call.logprobs, strict=True)):
                    new = logs[len(call.prompt_ids) - 1 + i, token]
                    weight = (new - old).exp().clamp(max=1 + config.eps_high).detach()
                    loss = loss - weight * (episode.reward - mean) * new / total
    return loss


@pytest.mark.parametrize("mixture", ["sparse", "sliding", "lightning"])
@pytest.mark.parametrize("shape", [list, grown])
def test_loss_and_gradient_are_those_of_every_call_alone(shape, mixture):
    config = replace(CONFIG, index_loss=0.0, clip=1e9)
    groups = shape(make_groups(4))
    alone = small_model(mixture)
    loss = one_sample_loss(alone, groups, config)
    loss.backward()
    gradients = {}

    class Spy(Trainer):
        def _update(self, totals):
            gradients.update(
                {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
            )
            return super()._update(totals)

    metrics = Spy(small_model(mixture), config).train(groups)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["micro_batches"] > 1
    assert (metrics["prefix_reuse"] > 1.3) == (shape is grown and mixture != "lightning")
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=2e-6 * scale, msg=name)


def test_interrupted_and_resumed_training_is_bitwise_the_uninterrupted(tmp_path):
    config = replace(CONFIG, mtp_loss=0.1)
    batches = [make_groups(seed, version=seed) for seed in range(4)]
    whole = Trainer(small_model(), config)
    rows = [whole.train(batch) for batch in batches]

    first = Trainer(small_model(), config)
    for batch in batches[:2]:
        first.train(batch)
    first.save(tmp_path)
    first.train(batches[2])  # lost with the crash

    resumed = Trainer(small_model(seed=9), config)
    assert resumed.load(tmp_path) and resumed.step == 2

    class Stopped(Exception):
        pass

    calls = iter(range(100))

    def stop_once() -> None:
        if next(calls) == 1:
            raise Stopped

    with pytest.raises(Stopped):
        resumed.train(batches[2], between=stop_once)
    again = [resumed.train(batch) for batch in batches[2:]]
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[2:]]
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not Trainer(small_model(), config).load(tmp_path / "empty")


def test_training_raises_what_was_rewarded_and_lowers_the_rest():
    groups = make_groups(5, groups=1)
    trainer = Trainer(small_model(), replace(CONFIG, learning_rate=3e-3, eps_high=1e9))

    def likelihoods():
        found = []
        for episode in groups[0].episodes:
            with torch.no_grad():
                parts = [
                    torch.log_softmax(trainer.model(torch.tensor([c.prompt_ids + c.sampled_ids]))[0], -1)[
                        range(len(c.prompt_ids) - 1, len(c.prompt_ids) + len(c.sampled_ids) - 1),
                        c.sampled_ids,
                    ].mean()
                    for c in episode.calls
                ]
            found.append(float(sum(parts)))
        return found

    before = likelihoods()
    for _ in range(3):
        metrics = trainer.train(groups)
    after = likelihoods()
    assert after[0] > before[0] and after[1] + after[2] < before[1] + before[2]
    assert trainer.step == trainer.model.version == 3
    assert metrics["staleness_mean"] == metrics["staleness_max"] == 2.0, "sampled by version 0, trained at 2"


def test_the_index_branch_and_the_mtp_modules_learn_only_from_their_own_losses():
    groups = make_groups(6)

    def changed(config):
        trainer = Trainer(small_model(), config)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train(groups)
        return {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}

    policy_only = changed(replace(CONFIG, index_loss=0.0, mtp_loss=0.0))
    assert policy_only and not any("index_" in n or n.startswith("mtp.") for n in policy_only)
    with_index = changed(replace(CONFIG, index_loss=0.5, mtp_loss=0.0))
    assert {n for n in with_index if "index_" not in n} == policy_only and with_index > policy_only
    with_mtp = changed(replace(CONFIG, index_loss=0.0, mtp_loss=0.5))
    assert {n for n in with_mtp if not n.startswith("mtp.")} == policy_only and with_mtp > policy_only


def test_warming_up_changes_nothing():
    warmed, cold = Trainer(small_model(), CONFIG), Trainer(small_model(), CONFIG)
    warmed.warm_up()
    assert warmed.train(make_groups(8))["loss"] == cold.train(make_groups(8))["loss"]
    state = cold.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in warmed.model.state_dict().items())


def test_a_batch_without_any_signal_changes_nothing():
    (group,) = make_groups(7, groups=1)
    group = replace(group, episodes=tuple(replace(e, reward=0.5) for e in group.episodes))
    trainer = Trainer(small_model(), CONFIG)
    before = {n: v.clone() for n, v in trainer.model.state_dict().items()}
    metrics = trainer.train([group])
    assert trainer.step == 1 and metrics["skipped_calls"] == metrics["calls"] == 6
    assert all(torch.equal(v, before[n]) for n, v in trainer.model.state_dict().items())
