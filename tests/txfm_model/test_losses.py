"""The sparse Poisson loss equals the dense one in value and gradient, and never sees an unmeasured gene."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from txfm_model.losses import measured_mask, poisson_floor, poisson_loss
from txfm_model.model import TxFM


@dataclass
class Target:
    panel_id: torch.Tensor
    target_indptr: torch.Tensor
    target_gene_ids: torch.Tensor
    target_counts: torch.Tensor


def one_sample(counts: list[float]) -> Target:
    """A sample that measures every gene."""
    genes = [i for i, c in enumerate(counts) if c]
    return Target(
        torch.tensor([0]),
        torch.tensor([0, len(genes)]),
        torch.tensor(genes, dtype=torch.int64),
        torch.tensor([counts[i] for i in genes], dtype=torch.float32),
    )


def dense_target(batch, n_genes: int) -> torch.Tensor:
    dense_BG = torch.zeros(len(batch.panel_id), n_genes, dtype=torch.float64)
    for b in range(len(batch.panel_id)):
        entries = slice(batch.target_indptr[b], batch.target_indptr[b + 1])
        dense_BG[b, batch.target_gene_ids[entries]] = batch.target_counts[entries].double()
    return dense_BG


def dense_loss(predicted_BG, batch, panels_NG) -> torch.Tensor:
    """The plain form, in float64: e^x̂ - e^x x̂ of each measured gene, mean over genes, mean over samples."""
    counts_BG = dense_target(batch, predicted_BG.shape[1])
    measured_BG = measured_mask(batch.panel_id, panels_NG)
    per_gene_BG = predicted_BG.exp() - (counts_BG + 1) * predicted_BG
    losses = [per_gene_BG[b][measured_BG[b]].mean() for b in range(len(predicted_BG))]
    return torch.stack(losses)


def test_values_written_in_the_specification():
    x = [0.0, math.log(4), math.log(251)]
    target = one_sample([math.expm1(value) for value in x])
    predicted = torch.tensor([[0.2, 1.1, 5.0]])
    parts = poisson_loss(predicted, target, torch.ones(1, 3, dtype=torch.bool))
    assert parts.sum_B.item() == pytest.approx(-1106.9612721153162, rel=1e-6)
    assert parts.loss.item() == pytest.approx(-1106.9612721153162 / 3, rel=1e-6)
    for i, expected in enumerate((1.02140275816017, -1.395833976053567, -1106.586840897423)):
        alone = one_sample([math.expm1(x[i])])
        got = poisson_loss(predicted[:, i : i + 1], alone, torch.ones(1, 1, dtype=torch.bool))
        assert got.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("count", "floor"), [(0.0, 1.0), (3.0, -1.545177), (1000.0, -5914.663534)])
def test_the_floor(count, floor):
    assert poisson_floor(torch.tensor(count, dtype=torch.float64)).item() == pytest.approx(floor, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_sparse_loss_equals_the_dense_one_in_value_and_gradient(make_batch, seed):
    batch, panels_NG = make_batch(seed, n=7)
    rng = torch.Generator().manual_seed(seed)
    predicted_BG = torch.rand(7, panels_NG.shape[1], generator=rng) * 7
    sparse, dense = predicted_BG.clone().requires_grad_(), predicted_BG.double().requires_grad_()
    parts = poisson_loss(sparse, batch, panels_NG)
    expected_B = dense_loss(dense, batch, panels_NG)
    torch.testing.assert_close(parts.mean_B.double(), expected_B, rtol=1e-5, atol=1e-4)
    (got,) = torch.autograd.grad(parts.loss, sparse)
    (want,) = torch.autograd.grad(expected_B.mean(), dense)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    n_measured_B = measured_mask(batch.panel_id, panels_NG).sum(1)
    torch.testing.assert_close(parts.sum_B, parts.mean_B * n_measured_B)


@pytest.mark.parametrize("seed", range(4))
def test_a_perfect_prediction_has_no_excess(make_batch, seed):
    batch, panels_NG = make_batch(seed)
    perfect_BG = dense_target(batch, panels_NG.shape[1]).log1p().float()
    parts = poisson_loss(perfect_BG, batch, panels_NG)
    assert parts.excess_B.abs().max() <= 1e-6 * parts.floor_B.abs().max() + 1e-5
    assert (poisson_loss(perfect_BG + 0.1, batch, panels_NG).excess_B > 0).all()


def test_genes_outside_the_panel_are_never_seen(make_batch):
    batch, panels_NG = make_batch(0)
    measured_BG = measured_mask(batch.panel_id, panels_NG)
    predicted_BG = torch.rand(measured_BG.shape) * 5
    other_BG = torch.where(measured_BG, predicted_BG, torch.full_like(predicted_BG, 11.0))
    poisoned_BG = torch.where(measured_BG, predicted_BG, torch.full_like(predicted_BG, torch.nan)).requires_grad_()
    parts = poisson_loss(poisoned_BG, batch, panels_NG)
    assert torch.equal(parts.mean_B, poisson_loss(other_BG, batch, panels_NG).mean_B)
    (gradient,) = torch.autograd.grad(parts.loss, poisoned_BG)
    assert torch.equal(gradient[~measured_BG], torch.zeros_like(gradient[~measured_BG]))
    assert (gradient[measured_BG] != 0).all()


def test_an_unmeasured_gene_gets_exactly_zero_gradient_in_the_whole_model(make_batch, tiny_config, vocabulary):
    batch, panels_NG = make_batch(1, n_panels=2)
    panels_NG[:, 7] = False  # gene 7 is measured nowhere in this batch
    keep = batch.target_gene_ids != 7
    kept_before = torch.cat([torch.zeros(1, dtype=torch.int64), keep.long().cumsum(0)])
    shown = torch.where(batch.gene_ids == 7, 0, batch.gene_ids)
    target = Target(
        batch.panel_id,
        kept_before[batch.target_indptr],
        batch.target_gene_ids[keep],
        batch.target_counts[keep],
    )
    model = TxFM(tiny_config, vocabulary).train()
    poisson_loss(model(shown, batch.values, batch.n_unmasked), target, panels_NG).loss.backward()
    for gradient in (model.head.weight.grad, model.head.bias.grad, model.tokens.codebook.grad):
        assert torch.equal(gradient[7], torch.zeros_like(gradient[7]))
    assert (model.head.weight.grad[0] != 0).any()
    assert (model.head.bias.grad[0] != 0).all()


def test_samples_without_counts_and_empty_targets():
    batch = Target(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1, 1]), torch.tensor([2]), torch.tensor([5.0]))
    panels_NG = torch.tensor([[True, False, True], [False, False, False]])
    parts = poisson_loss(torch.zeros(3, 3), batch, panels_NG)
    torch.testing.assert_close(parts.mean_B, torch.tensor([1.0, 1.0, 0.0]))  # the third sample measures nothing
    torch.testing.assert_close(parts.floor_B, torch.tensor([1.0, (1 + 6 * (1 - math.log(6))) / 2, 0.0]))
    nothing = Target(torch.tensor([0]), torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert poisson_loss(torch.zeros(1, 3), nothing, panels_NG).excess_B.item() == 0


def test_the_loss_is_float32_under_autocast(make_batch):
    batch, panels_NG = make_batch(2)
    predicted_BG = torch.rand(6, panels_NG.shape[1]) * 10
    plain = poisson_loss(predicted_BG, batch, panels_NG)
    with torch.autocast("cpu", torch.bfloat16):
        under = poisson_loss(predicted_BG, batch, panels_NG)
    assert under.mean_B.dtype == torch.float32
    assert torch.equal(under.mean_B, plain.mean_B)
    assert poisson_loss(predicted_BG.bfloat16(), batch, panels_NG).mean_B.dtype == torch.float32


def test_the_mean_is_over_genes_first_then_over_samples():
    """A bulk sample with many genes must not outweigh a cell with few."""
    panels_NG = torch.tensor([[True] * 4, [True] + [False] * 3])
    batch = Target(torch.tensor([0, 1]), torch.tensor([0, 0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0))
    predicted_BG = torch.stack([torch.full((4,), 2.0), torch.full((4,), 1.0)])
    expected = np.mean([math.exp(2) - 2, math.exp(1) - 1])
    assert poisson_loss(predicted_BG, batch, panels_NG).loss.item() == pytest.approx(expected, rel=1e-6)
