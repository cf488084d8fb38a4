"""Validation sums, and the panel-mean predictor in closed form against the loss itself."""

import numpy as np
import pytest
import torch

from txfm_data.panels import make_panels
from txfm_model.config import LossConfig
from txfm_model.losses import Loss, poisson_loss
from txfm_model.run import panel_table
from txfm_model.validation import PanelMeanPredictor, model_totals


def poisson(model) -> Loss:
    return Loss.of_parts(LossConfig(), model.config)


@pytest.fixture
def corpus(make_batch):
    batches_and_panels = [make_batch(seed, n=5) for seed in (4, 4, 4)]
    batches = [batch for batch, _ in batches_and_panels]
    table_NG = batches_and_panels[0][1]
    genes = [np.flatnonzero(row) for row in table_NG.numpy()]
    rng = np.random.default_rng(0)
    panels = make_panels(genes, [rng.gamma(0.5, 500, len(g)).astype(np.float32) for g in genes])
    return panels, table_NG, batches


def test_the_table_of_panels(corpus):
    panels, table_NG, _ = corpus
    assert torch.equal(panel_table(panels, 40), table_NG)
    assert panel_table(make_panels([], []), 40).shape == (0, 40)


def test_the_panel_mean_predictor_equals_the_loss_of_its_predictions(corpus):
    panels, table_NG, batches = corpus
    predicted_NG = torch.zeros(len(panels), 40)
    for panel_id in range(len(panels)):
        ids = torch.from_numpy(panels.genes(panel_id).astype(np.int64))
        predicted_NG[panel_id, ids] = torch.from_numpy(np.log1p(panels.mean(panel_id)))
    loss = excess = 0.0
    for batch in batches:
        parts = poisson_loss(predicted_NG[batch.panel_id], batch, table_NG)
        loss += parts.mean_B.sum().item()
        excess += parts.excess_B.sum().item()
    got = PanelMeanPredictor(panels, 40).totals(batches)
    assert got == (pytest.approx(loss, rel=1e-5), pytest.approx(excess, rel=1e-4), 15)


def test_no_constant_does_better_than_the_panel_mean(make_batch):
    """On the samples that the means are of, as the corpus has them for its train split."""
    batch, table_NG = make_batch(9, n=40, n_panels=1)
    genes = np.flatnonzero(table_NG[0].numpy())
    totals_G = np.bincount(batch.target_gene_ids.numpy(), batch.target_counts.numpy(), minlength=40)
    means = (totals_G / 40)[genes]
    best = PanelMeanPredictor(make_panels([genes], [means]), 40).totals([batch])
    for factor in (0.9, 1.1):
        worse = PanelMeanPredictor(make_panels([genes], [means * factor]), 40).totals([batch])
        assert worse[0] > best[0]


def test_model_totals_are_sums_over_samples(corpus, tiny_model):
    _, table_NG, batches = corpus
    tiny_model.train()
    totals_N3 = model_totals(tiny_model, batches, poisson(tiny_model), table_NG, "no")
    loss, excess, n_samples = totals_N3.sum(0).tolist()
    assert tiny_model.training
    tiny_model.eval()
    parts = [poisson_loss(tiny_model(b.gene_ids, b.values, b.n_unmasked).log1p_BG, b, table_NG) for b in batches]
    assert n_samples == 15
    assert loss == pytest.approx(sum(p.mean_B.sum().item() for p in parts), rel=1e-5)
    assert excess == pytest.approx(sum(p.excess_B.sum().item() for p in parts), rel=1e-5)
    for panel_id, (_, of_panel, n) in enumerate(totals_N3.tolist()):
        expected = [p.excess_B[b.panel_id == panel_id] for p, b in zip(parts, batches, strict=True)]
        assert n == len(torch.cat(expected))
        assert of_panel == pytest.approx(torch.cat(expected).sum().item(), rel=1e-5)


def test_no_samples(corpus, tiny_model):
    panels, table_NG, _ = corpus
    assert model_totals(tiny_model, [], poisson(tiny_model), table_NG, "no").tolist() == [[0.0] * 3] * 3
    assert PanelMeanPredictor(panels, 40).totals([]) == (0.0, 0.0, 0)
