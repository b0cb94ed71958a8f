"""The MTP module learns to draft: several guesses ahead, and nothing but the module changes."""

import dataclasses

import numpy as np
import pytest
import torch

from longforge.engine import Engine
from longforge.engine.draft_length import DraftCosts
from longforge.engine.request import GenerationRequest
from longforge.errors import InputError
from longforge.model.causal_lm import CausalLM
from longforge.protocol import SamplingParams
from longforge.training.config import OptimiserConfig, PretrainConfig, ScheduleConfig
from longforge.training.data import BatchStream, Sample, pack
from longforge.training.drafting import DraftTrainer, draft_scores, unrolled
from small_training import TINY, Repeats

FREE = DraftCosts(rows=(1,), step=(1.0,), draft=(0.0,))


def decided_model():
    """A model whose own next tokens are clear enough to be learnt."""
    torch.manual_seed(7)
    model = CausalLM(TINY)
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    return model


def trainer(folder, model, **schedule):
    plan = ScheduleConfig(**{"steps": 60, "warmup_steps": 2, "log_every": 1, **schedule})
    stream = BatchStream({"repeats": (Repeats(), 1.0)}, tokens=96, block_size=4, seed=3)
    config = PretrainConfig(schedule=plan, optimiser=OptimiserConfig(matrices="muon", lr=1e-2, bf16=False))
    return DraftTrainer(model, stream, config, folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model before and after, and the loss of each step."""
    model = decided_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(tmp_path_factory.mktemp("run"), model)
    losses = [run.step().mtp_loss for _ in range(60)]
    return before, model, losses


def test_the_loss_falls(trained):
    _, _, losses = trained
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


def test_every_guess_gets_better(trained):
    before, model, _ = trained
    batches = [pack([Repeats().sample(i) for i in range(1000, 1020)], TINY.block_size)]
    untrained = CausalLM(TINY)
    untrained.load_state_dict(before)
    old, new = draft_scores(untrained, batches), draft_scores(model, batches)
    assert list(new) == ["guess 1", "guess 2", "guess 3"]
    assert all(new[guess] > old[guess] for guess in new), (old, new)


def test_nothing_but_the_module_changes(trained):
    before, model, _ = trained
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("mtp.") for name in changed)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = trainer(tmp_path / "whole", decided_model(), steps=8)
    assert whole.run()
    first = trainer(tmp_path / "parts", decided_model(), steps=8)
    for _ in range(5):
        first.step()
    first.save()
    second = trainer(tmp_path / "parts", decided_model(), steps=8)
    assert second.resume() and second.done == 5
    assert second.run()
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_the_first_pass_guesses_what_the_engine_guesses(trained):
    _, model, _ = trained
    prompt, new = [3, 1, 4, 1, 5, 9], 40
    engine = Engine(model.eval(), pages=24, drafts=1, draft_costs=FREE)
    engine.submit(GenerationRequest("a", tuple(prompt), SamplingParams(max_tokens=new, temperature=0.0)))
    tokens = [event.token_id for _ in range(200) if engine.has_work for event in engine.step()]
    ids = np.array(prompt + tokens, dtype=np.int64)
    weights = np.array([0.0] * len(prompt) + [1.0] * len(tokens), dtype=np.float32)
    with torch.no_grad():
        seen = unrolled(model, pack([Sample(ids, weights)], TINY.block_size), 1, index_loss=False)
    hits = dict(zip(seen.rows.tolist(), seen.guessed[0].argmax(-1).tolist(), strict=True))
    accepted, drafted, last = 0, 0, len(prompt)
    while last + 2 < len(ids):  # the last token alone is not guessed: a step gives it anyway
        right = hits[last] == ids[last + 1]
        accepted, drafted, last = accepted + right, drafted + 1, last + 1 + right
    stats = engine.stats()
    assert (stats.accepted_tokens, stats.drafted_tokens) == (accepted, drafted)
    assert accepted > 0


def test_a_model_without_a_module_is_refused(tmp_path):
    with pytest.raises(InputError, match="MTP module"):
        trainer(tmp_path, CausalLM(dataclasses.replace(TINY, mtp_modules=0)))
