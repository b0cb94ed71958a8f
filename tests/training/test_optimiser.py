"""Schedules, groups and the optimiser's state as tensors."""

import pytest
import torch
from torch import nn

from longforge.training.config import PretrainConfig
from longforge.training.muon import MuonAdamW, orthogonalised
from longforge.training.optimiser import (
    build_adamw,
    clip_groups,
    load_optimiser_tensors,
    optimiser_tensors,
    parameter_groups,
)
from longforge.training.schedule import learning_rate_factor, stage_of


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.q_proj = nn.Linear(4, 4)
        self.index_q_proj = nn.Linear(4, 2, bias=False)
        self.norm = nn.LayerNorm(4)
        self.mtp = nn.ModuleList([nn.Linear(4, 4, bias=False)])

    def loss(self, seed):
        x = self.embed_tokens(torch.randint(5, (3,), generator=torch.Generator().manual_seed(seed)))
        return (self.index_q_proj(self.mtp[0](self.norm(self.q_proj(x)))) ** 2).sum()


def test_every_parameter_is_in_one_group_and_norms_biases_and_tables_are_not_decayed():
    model = Tiny()
    groups = {g["name"]: g for g in parameter_groups(model, lr=1e-3, index_lr=5e-3, weight_decay=0.1)}
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    assert groups["matrices"]["params"] == [model.q_proj.weight]
    assert groups["index"]["params"] == [model.index_q_proj.weight]
    assert groups["mtp"]["params"] == [model.mtp[0].weight]
    assert (groups["vectors"]["weight_decay"], groups["matrices"]["weight_decay"]) == (0.0, 0.1)
    assert (groups["index"]["lr"], groups["matrices"]["lr"]) == (5e-3, 1e-3)


def test_rate_warms_up_linearly_and_falls_to_the_end():
    factors = [learning_rate_factor(step, steps=110, warmup_steps=10) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0 and factors[60] == pytest.approx(0.5) and factors[110] == 0.0
    assert learning_rate_factor(110, steps=110, warmup_steps=10, final=0.1) == pytest.approx(0.1)


def test_stages_follow_each_other():
    config = PretrainConfig().with_schedule(dense_share=0.25, mtp_share=0.2, mtp_detached_share=0.5)
    seen = [(stage_of(i / 100, config).phase, stage_of(i / 100, config).mtp) for i in range(100)]
    assert list(dict.fromkeys(seen)) == [
        ("warmup", "off"), ("sparse", "off"), ("sparse", "detached"), ("sparse", "joint"),
    ]  # fmt: skip
    assert stage_of(0.81, config).mtp_weight == 0.3 and stage_of(1.0, config).mtp_weight == pytest.approx(0.1)


def test_the_index_branch_is_clipped_apart():
    model = Tiny()
    optimiser = build_adamw(parameter_groups(model, lr=1e-3))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    model.index_q_proj.weight.grad.fill_(1e4)
    clip_groups(optimiser, 1.0)
    assert float(model.index_q_proj.weight.grad.norm()) == pytest.approx(1.0, rel=1e-4)
    assert float(model.q_proj.weight.grad[0, 0]) == pytest.approx(0.01)


@pytest.mark.parametrize("build", [build_adamw, MuonAdamW])
def test_state_taken_out_and_put_back_goes_on_bit_for_bit(build):
    torch.manual_seed(0)
    models = [Tiny(), Tiny()]
    models[1].load_state_dict(models[0].state_dict())
    optimisers = [build(parameter_groups(model, lr=1e-2)) for model in models]

    def train(which, seeds):
        for seed in seeds:
            models[which].loss(seed).backward()
            optimisers[which].step()
            optimisers[which].zero_grad()

    train(0, range(4))
    models[1].load_state_dict(models[0].state_dict())
    load_optimiser_tensors(models[1], optimisers[1], optimiser_tensors(models[0], optimisers[0]))
    train(0, range(4, 8))
    train(1, range(4, 8))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (3, 12, 20)])
def test_orthogonalised_matrices_keep_their_directions_at_even_strength(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    result = orthogonalised(matrices)
    strengths = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape and float(strengths.min()) > 0.5 and float(strengths.max()) < 1.4
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ result @ v.mT
    off_diagonal = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert float(off_diagonal.abs().max()) < 0.05


def test_muon_moves_matrices_only_and_adamw_the_rest_as_it_always_does():
    torch.manual_seed(0)
    models = [Tiny(), Tiny()]
    models[1].load_state_dict(models[0].state_dict())
    for model, build in zip(models, (build_adamw, MuonAdamW), strict=True):
        model.loss(1).backward()
        build(parameter_groups(model, lr=1e-2)).step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b) != (name == "q_proj.weight"), name
