"""Losses on edges are the plain losses, counted as told."""

import pytest
import torch
import torch.nn.functional as F

from longforge.kernels.layout import PackedLayout
from longforge.model.causal_lm import PackedOutput
from longforge.training.losses import Edges, cross_entropy, mtp_loss, next_token_edges, thin_edges

LENGTHS = (5, 1, 9, 2)
VOCAB, WIDTH = 17, 6


@pytest.fixture
def packed():
    torch.manual_seed(0)
    n = sum(LENGTHS)
    ids = torch.randint(VOCAB, (n,))
    hidden = torch.randn(n, WIDTH, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH, dtype=torch.float64)
    return ids, hidden, head, PackedLayout.from_lengths(LENGTHS, 4)


def test_edges_of_whole_sequences_give_the_shifted_sequence_loss(packed):
    ids, hidden, head, layout = packed
    edges = next_token_edges(ids, layout, torch.ones(len(ids)))
    loss = cross_entropy(hidden, edges, lambda rows: rows @ head.T)
    terms = []
    for rows, targets in zip(hidden.split(LENGTHS), ids.split(LENGTHS), strict=True):
        terms.append(F.cross_entropy((rows[:-1] @ head.T).float(), targets[1:], reduction="sum"))
    expected = torch.stack(terms).sum() / sum(n - 1 for n in LENGTHS)
    torch.testing.assert_close(loss, expected)
    mine, theirs = (torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("ahead", [1, 2, 3, 40])
def test_an_edge_never_leaves_its_path_and_weighs_as_its_target(packed, ahead):
    ids, _, _, layout = packed
    weights = torch.arange(len(ids)).float() % 3
    edges = next_token_edges(ids, layout, weights, ahead=ahead)
    expected = [
        (i, int(ids[i + ahead]), float(weights[i + ahead]))
        for i in range(len(ids) - ahead)
        if layout.paths[i] == layout.paths[i + ahead] and weights[i + ahead] > 0
    ]
    assert (
        list(zip(edges.rows.tolist(), edges.targets.tolist(), edges.weights.tolist(), strict=True))
        == expected
    )


def test_a_weight_counts_like_repetition(packed):
    _, hidden, head, _ = packed

    def loss(rows, targets, weights):
        edges = Edges(torch.tensor(rows), torch.tensor(targets), torch.tensor(weights))
        return cross_entropy(hidden, edges, lambda x: x @ head.T)

    torch.testing.assert_close(loss([3, 5], [1, 2], [2.0, 1.0]), loss([3, 3, 5], [1, 1, 2], [1.0, 1.0, 1.0]))


def test_no_edges_is_a_loss_of_zero_with_a_gradient(packed):
    ids, hidden, head, layout = packed
    loss = cross_entropy(hidden, next_token_edges(ids, layout, torch.zeros(len(ids))), lambda x: x @ head.T)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()


def test_thinning_keeps_heavy_edges_and_the_expected_sum():
    weights = torch.cat([torch.full((4000,), 0.1), torch.ones(50)])
    edges = Edges(torch.arange(4050), torch.zeros(4050, dtype=torch.int64), weights)
    thin = thin_edges(edges, below=0.5, share=0.25, generator=torch.Generator().manual_seed(1))
    assert int((thin.rows >= 4000).sum()) == 50
    assert thin.weights[thin.rows < 4000].unique().tolist() == pytest.approx([0.4])
    assert float(thin.weights.sum()) == pytest.approx(450, rel=0.1)
    assert thin_edges(edges, below=0.5, share=1.0) is edges


class TinyMtp(torch.nn.Module):
    """Two modules that add the next token's embedding: enough to see which ids and rows the loss pairs."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.head = torch.nn.Parameter(torch.randn(VOCAB, WIDTH))

    def logits(self, hidden):
        return hidden @ self.head.T

    def mtp_packed(self, hidden, next_ids, layout, module=0, *, index_loss=False):
        return PackedOutput(hidden + (module + 1) * self.table[next_ids], None, [])


def test_mtp_module_m_sees_token_m_plus_one_and_predicts_the_one_after():
    torch.manual_seed(2)
    model, ids, hidden = TinyMtp(), torch.randint(VOCAB, (7,)), torch.randn(7, WIDTH)
    layout = PackedLayout.from_lengths([7], 4)
    loss = mtp_loss(model, hidden, ids, layout, torch.ones(7), modules=2).loss
    first = hidden[:5] + model.table[ids[1:6]]
    second = hidden[:4] + model.table[ids[1:5]] + 2 * model.table[ids[2:6]]
    expected = (
        F.cross_entropy(model.logits(first), ids[2:]) + F.cross_entropy(model.logits(second), ids[3:])
    ) / 2
    torch.testing.assert_close(loss, expected)
