"""What each loss reaches, and how experts are kept in balance."""

import pytest
import torch
import torch.nn.functional as F

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout

LENGTHS = [37, 20]


def index_names(model):
    return {name for name, _ in model.named_parameters() if "index_" in name}


def touched(model):
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_the_language_loss_gives_the_index_branch_nothing(config, model, phase):
    lm = model(config("m3"))
    ids = torch.randint(0, 61, (57,))
    out = lm.forward_packed(ids, PackedLayout.from_lengths(LENGTHS, 4), phase=phase, index_loss=True)
    F.cross_entropy(lm.logits(out.hidden), ids).backward()
    assert len(index_names(lm)) == 6
    assert not touched(lm) & index_names(lm)
    everything = {name for name, _ in lm.named_parameters()}
    assert everything - touched(lm) == index_names(lm)


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_the_index_loss_gives_the_backbone_nothing(config, model, phase):
    lm = model(config("m3"))
    ids = torch.randint(0, 61, (57,))
    out = lm.forward_packed(ids, PackedLayout.from_lengths(LENGTHS, 4), phase=phase, index_loss=True)
    assert out.index_loss is not None and out.index_loss > 0
    out.index_loss.backward()
    assert touched(lm) == index_names(lm)


def test_the_index_loss_is_the_sum_over_layers_and_obeys_weights(config, model):
    ids = torch.randint(0, 61, (57,))
    spans = PackedLayout.from_lengths(LENGTHS, 4)
    lm = model(config("m3"))
    both = lm.forward_packed(ids, spans, index_loss=True).index_loss
    one = model(config("m3", layers=("full/dense", "sparse/moe", "full/moe")))
    shared = {k: v for k, v in lm.state_dict().items() if not k.startswith("model.layers.2.")}
    one.load_state_dict(shared, strict=False)
    first = one.forward_packed(ids, spans, index_loss=True).index_loss
    assert 0 < first < both
    only_first = torch.tensor([1.0] * 37 + [0.0] * 20)
    alone = lm.forward_packed(ids[:37], PackedLayout.from_lengths([37], 4), index_loss=True).index_loss
    weighted = lm.forward_packed(ids, spans, index_loss=True, index_weights=only_first).index_loss
    torch.testing.assert_close(weighted, alone, rtol=1e-5, atol=1e-6)
    assert lm.forward_packed(ids, spans).index_loss is None


def test_the_sign_rule_moves_the_bias_towards_balance(config, model):
    lm = model(config("m3"))
    before = [r.e_score_correction_bias.clone() for r in lm.routers()]
    loads = [torch.tensor([10, 0, 5, 5, 5]), torch.tensor([0, 0, 0, 0, 25])]
    lm.update_expert_bias(loads, rate=0.01)
    moved = [r.e_score_correction_bias - b for r, b in zip(lm.routers(), before, strict=True)]
    torch.testing.assert_close(moved[0], torch.tensor([-0.01, 0.01, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(moved[1], torch.tensor([0.01, 0.01, 0.01, 0.01, -0.01]))
    with pytest.raises(InputError, match="loads: one per expert layer, 2, is needed, got 1"):
        lm.update_expert_bias(loads[:1], 0.01)


def test_the_sign_rule_evens_out_the_loads(config, model):
    lm = model(config("m2", layers=("full/moe",), experts=8))
    ids = torch.randint(0, 61, (400,))
    spans = PackedLayout.from_lengths([400], 4)
    spread = []
    for _ in range(150):
        with torch.no_grad():
            load = lm.forward_packed(ids, spans).expert_loads
        assert int(load[0].sum()) == 800
        spread.append(float(load[0].float().std()))
        lm.update_expert_bias(load, rate=0.01)
    assert min(spread[-20:]) < 0.3 * spread[0]


def test_the_bias_chooses_and_does_not_weigh(config, model):
    lm = model(config("m3"))
    router = lm.routers()[0]
    x = torch.randn(9, 32)
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.tensor([100.0, 0, 0, 100.0, 0]))
        ids, weights = router(x)
        scores = torch.sigmoid(x @ router.weight.T)
    assert {tuple(sorted(row)) for row in ids.tolist()} == {(0, 3)}
    chosen = scores.gather(-1, ids)
    torch.testing.assert_close(weights, 2.0 * chosen / chosen.sum(-1, keepdim=True))


def test_autocast_does_not_reach_the_router(config, model):
    router = model(config("m3")).routers()[0]
    x = torch.randn(200, 32)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert cast.weights.dtype == torch.float32
    assert torch.equal(cast.ids, plain.ids) and torch.equal(cast.weights, plain.weights)


def test_the_bias_survives_a_change_of_dtype(config, model):
    lm = model(config("m3"))
    exact = lm.routers()[0].e_score_correction_bias.clone()
    lm.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(lm.routers()[0].e_score_correction_bias, exact)
    assert lm.to(torch.bfloat16).routers()[0].e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_mtp_modules_predict_further_and_share_tables(config, model, family):
    lm = model(config(family, mtp_modules=2))
    spans = PackedLayout.from_lengths(LENGTHS, 4)
    ids, one, two = (torch.randint(0, 61, (57,)) for _ in range(3))
    main = lm.forward_packed(ids, spans, index_loss=True)
    first = lm.mtp_packed(main.hidden, one, spans, 0, index_loss=True)
    second = lm.mtp_hidden(first.hidden, two, spans, 1)
    assert first.hidden.shape == second.shape == (57, 32)
    assert (first.index_loss is not None) == (family == "m3")
    assert len(main.expert_loads + first.expert_loads) == len(lm.config.layers) - (family == "m3") + 1
    F.cross_entropy(lm.logits(second), two).backward()
    grads = touched(lm)
    assert {"model.embed_tokens.weight", "lm_head.weight", "mtp.0.eh_proj.weight"} <= grads
    assert {"mtp.1.enorm.weight", "mtp.1.hnorm.weight", "mtp.1.final_layernorm.weight"} <= grads
    assert "model.layers.1.self_attn.qkv_proj.weight" in grads
    with pytest.raises(InputError, match="the model has 2 MTP modules, got index 2"):
        lm.mtp_hidden(main.hidden, one, spans, 2)


def test_loads_of_mtp_modules_may_join_the_bias_update(config, model):
    lm = model(config("m3", mtp_modules=1))
    before = lm.routers()[-1].e_score_correction_bias.clone()
    loads = [torch.tensor([5, 5, 5, 5, 5])] * 2
    lm.update_expert_bias(loads, 0.01)
    assert torch.equal(lm.routers()[-1].e_score_correction_bias, before)
    lm.update_expert_bias([*loads, torch.tensor([9, 4, 4, 4, 4])], 0.01)
    moved = lm.routers()[-1].e_score_correction_bias - before
    torch.testing.assert_close(moved, torch.tensor([-0.01, 0.01, 0.01, 0.01, 0.01]))


def test_one_step_of_descent_lowers_the_loss_in_every_mixer(config, model):
    lm = model(config("m3", layers=("full/dense", "sliding/moe", "lightning/moe", "sparse/moe")))
    ids = torch.randint(0, 61, (41,))
    spans = PackedLayout.from_lengths([25, 16], 4)
    optimiser = torch.optim.SGD(lm.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        out = lm.forward_packed(ids, spans, index_loss=True)
        loss = F.cross_entropy(lm.logits(out.hidden), ids.roll(-1)) + out.index_loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
