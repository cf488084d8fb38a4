"""Which branches of a sample are dropped: rates, chance, and that (seed, epoch, sample id) alone decide."""

import itertools

import numpy as np
import pytest
import torch

from txfm_data.kernels import hash_range
from txfm_model.config import ModelConfig
from txfm_model.encoder import Block
from txfm_model.model import TxFM
from txfm_model.stochastic_depth import branch_scales, branch_shares, stochastic_depth_rates

RATES = [0.0, 0.25, 0.5]


def test_rates_of_the_specification():
    assert stochastic_depth_rates(12, 0.1)[:3] == pytest.approx([0, 0.009091, 0.018182], abs=1e-6)
    assert stochastic_depth_rates(12, 0.1)[11] == pytest.approx(0.1)
    large = stochastic_depth_rates(24, 0.3)
    assert [large[i] for i in (0, 1, 12, 23)] == pytest.approx([0, 0.013043, 0.156522, 0.3], abs=1e-6)
    assert stochastic_depth_rates(1, 0.3) == [0.0]


def test_values_and_shares():
    scales_RB = branch_scales(RATES, seed=5, epoch=2, sample_id_B=np.arange(20_000))
    assert scales_RB.shape == (6, 20_000)
    assert scales_RB.dtype == np.float32
    assert (scales_RB[:2] == 1).all()
    for row, rate in zip(scales_RB, np.repeat(RATES, 2), strict=True):
        assert np.isin(row, np.float32([0, 1 / (1 - rate)])).all()
        assert (row == 0).mean() == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / 20_000))
        assert row.mean() == pytest.approx(1, abs=0.05)
    kept = (scales_RB[2:] > 0).astype(float)
    assert np.abs(np.corrcoef(kept) - np.eye(4)).max() < 0.04  # branches are dropped independently


def test_seed_epoch_and_sample_decide_and_nothing_else():
    ids = np.array([7, 3, 2**59 - 1, 900, 12])
    whole = branch_scales([0.5] * 8, seed=1, epoch=4, sample_id_B=ids)
    order = np.array([4, 0, 3, 1, 2])
    assert np.array_equal(branch_scales([0.5] * 8, 1, 4, ids[order]), whole[:, order])
    assert np.array_equal(branch_scales([0.5] * 8, 1, 4, ids[1:3]), whole[:, 1:3])
    assert np.array_equal(branch_scales([0.5] * 5, 1, 4, ids), whole[:10])
    for seed, epoch in ((2, 4), (1, 5)):
        assert not np.array_equal(branch_scales([0.5] * 8, seed, epoch, ids), whole)
    assert branch_scales([0.5], 1, 4, np.empty(0, np.int64)).shape == (2, 0)


def test_the_draws_are_not_those_of_the_mask():
    of_mask = np.empty(64, np.uint64)
    hash_range(1, 4, 7, of_mask)
    as_if = np.where((of_mask >> np.uint64(11)).astype(float) * 2.0**-53 >= 0.5, 2, 0)
    assert not np.array_equal(branch_scales([0.5] * 32, 1, 4, np.array([7]))[:, 0], as_if)


def test_a_dropped_branch_leaves_the_sample_as_it_was():
    config = ModelConfig(width=16, heads=2, layerscale_init=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block, x_BTD = Block(config), torch.randn(4, 5, 16)
    scale_2B = np.array([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 4.0, 1.0]], np.float32)
    as_array, as_tensor = (
        branch_shares(scales, [0.5], x_BTD.device) for scales in (scale_2B, torch.from_numpy(scale_2B))
    )
    assert [share.kept.tolist() for share in as_array] == [[1, 3], [2, 3]]
    assert [share.kept for share in as_tensor] == [None, None]
    for n_queries, shares in itertools.product((1, 5), (as_array, as_tensor)):
        x_BQD = x_BTD[:, :n_queries]
        attended = block.attention(block.attention_norm(x_BTD), None, n_queries, block.attention_scale)
        mlp = lambda y: block.mlp(block.mlp_norm(y)) * block.mlp_scale.gamma  # noqa: E731
        expected = [
            x_BQD[0],
            (x_BQD + 2 * attended)[1],
            (x_BQD + 4 * mlp(x_BQD))[2],
            (x_BQD + attended + mlp(x_BQD + attended))[3],
        ]
        torch.testing.assert_close(block(x_BTD, None, n_queries, *shares), torch.stack(expected))


def test_without_scales_training_draws_and_evaluation_does_not(vocabulary, make_batch):
    batch, _ = make_batch(0)
    model = TxFM(ModelConfig(width=16, blocks=3, heads=2, layerscale_init=1.0, stochastic_depth=0.5), vocabulary)
    model.eval()
    first, again = (model.encode(batch.gene_ids, batch.values) for _ in range(2))
    assert torch.equal(first, again)
    ones = torch.ones(6, 6)
    torch.testing.assert_close(model.encode(batch.gene_ids, batch.values, branch_scale_RB=ones), first)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [model.encode(batch.gene_ids, batch.values) for _ in range(2)]
        torch.manual_seed(0)
        assert torch.equal(model.encode(batch.gene_ids, batch.values), drawn[0])
    assert not torch.equal(*drawn)
    torch.testing.assert_close(model.encode(batch.gene_ids, batch.values, branch_scale_RB=ones), first)


def test_drawn_scales_have_their_rates(vocabulary):
    model = TxFM(ModelConfig(width=4, blocks=3, heads=1, stochastic_depth=0.5), vocabulary)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scale_RB = model.encoder._drawn_branch_scales(4000)
    for row, rate in zip(scale_RB, (0.0, 0.0, 0.25, 0.25, 0.5, 0.5), strict=True):
        assert torch.isin(row, torch.tensor([0, 1 / (1 - rate)])).all()
        assert row.mean().item() == pytest.approx(1, abs=0.08)
