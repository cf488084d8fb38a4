"""One function sets every parameter, from a seed alone."""

import math

import numpy as np
import pytest
import torch

from txfm_data.vocabulary import GeneStatistics
from txfm_model.activations import Activation, rectified_tanh
from txfm_model.config import ModelConfig
from txfm_model.initialise import initialise
from txfm_model.model import TxFM


@pytest.mark.parametrize("tokens", ["concat_project", "concat"])
@pytest.mark.parametrize("count_head", ["none", "nb", "zinb"])
def test_no_parameter_is_left_out(vocabulary, tokens, count_head):
    model = TxFM(ModelConfig(width=16, blocks=2, heads=2, tokens=tokens, count_head=count_head), vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialise(model, seed=1)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_seed_decides_and_the_global_state_does_not(tiny_config, vocabulary):
    models = []
    for global_seed, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = TxFM(tiny_config, vocabulary)
        torch.set_rng_state(before)
        initialise(model, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[1]["tokens.codebook"], models[2]["tokens.codebook"])


def test_spread_of_each_kind(vocabulary):
    model = TxFM(ModelConfig(width=128, blocks=1, heads=2, layerscale_init=1e-4, head_init="zero"), vocabulary)
    block = model.encoder.blocks[0]
    assert block.mlp[0].weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.05)  # cut at two deviations
    assert block.mlp[0].weight.abs().max() <= 0.04
    assert model.tokens.codebook.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(block.attention_scale.gamma, torch.full((128,), 1e-4))
    assert torch.equal(block.mlp_norm.weight, torch.ones(128))
    assert not model.head.bias.any()


def test_corpus_mean_puts_each_gene_at_its_mean(tiny_config, vocabulary, statistics):
    model = TxFM(tiny_config, vocabulary)
    initialise(model, statistics=statistics)
    expected = 4 * math.e * np.arctanh(statistics.mean_log1p / math.log1p(1e5))
    np.testing.assert_allclose(model.head.bias.detach(), np.maximum(expected, 0.3), rtol=1e-6)
    above = expected > 0.3
    predicted = rectified_tanh(model.head.bias.detach(), 1e5).numpy()
    np.testing.assert_allclose(predicted[above], statistics.mean_log1p[above], rtol=1e-5)
    zero = TxFM(ModelConfig(**{**vars(tiny_config), "head_init": "zero"}), vocabulary)
    initialise(zero, statistics=statistics)
    torch.testing.assert_close(model.head.weight, zero.head.weight * 0.25)


def test_without_statistics_every_gene_starts_alive(tiny_model):
    torch.testing.assert_close(tiny_model.head.bias, torch.full((40,), 0.3))


def test_statistics_of_another_vocabulary_are_refused(tiny_model):
    few = GeneStatistics(np.ones(3, np.int64), np.ones(3, np.int64), np.ones(3))
    with pytest.raises(ValueError, match="cover 3 genes, the gene head 40"):
        initialise(tiny_model, statistics=few)


def test_an_impossible_mean_is_refused(tiny_model, statistics):
    wrong = GeneStatistics(statistics.n_measured, statistics.n_nonzero, statistics.mean_log1p + 20)
    with pytest.raises(ValueError, match="build the shards again"):
        initialise(tiny_model, statistics=wrong)


@pytest.mark.parametrize("activation", ["rect_tanh", "relu", "clamped_relu", "softmax"])
@pytest.mark.parametrize("count_head", ["none", "nb", "zinb"])
def test_each_activation_starts_at_the_corpus_mean(vocabulary, statistics, activation, count_head):
    config = ModelConfig(width=16, blocks=1, heads=2, activation=activation, count_head=count_head)
    model = TxFM(config, vocabulary)
    initialise(model, statistics=statistics)
    mean_G = torch.from_numpy(statistics.mean_log1p).float()
    predicted_G = Activation.of(config)(model.head.bias.detach()[None])[0]
    if activation == "softmax":
        shares = mean_G.expm1().clamp_min(0.01)
        torch.testing.assert_close(predicted_G, torch.log1p(1e5 * shares / shares.sum()))
    else:
        above = mean_G > 0.35
        torch.testing.assert_close(predicted_G[above], mean_G[above])
        assert (predicted_G[~above] > 0.25).all()  # alive
    if count_head != "none":
        assert not model.head.log_dispersion.any()
    if count_head == "zinb":
        assert (model.head.zero_inflation.bias == -3).all()
        zero = TxFM(ModelConfig(**{**vars(config), "head_init": "zero"}), vocabulary)
        assert not zero.head.zero_inflation.bias.any()
        assert torch.equal(zero.head.zero_inflation.weight, TxFM(config, vocabulary).head.zero_inflation.weight)


def test_genes_that_are_never_seen_start_alive(vocabulary):
    never = GeneStatistics(np.zeros(40, np.int64), np.zeros(40, np.int64), np.zeros(40))
    for activation in ("rect_tanh", "relu", "clamped_relu", "softmax"):
        model = TxFM(ModelConfig(width=16, blocks=1, heads=2, activation=activation), vocabulary)
        initialise(model, statistics=never)
        assert (model.head.activation(model.head.bias.detach()[None]) > 0.25).all()


def test_values_that_are_not_scaled_have_no_statistics(vocabulary, statistics):
    for activation, start in (("rect_tanh", 0.3), ("relu", 0.3), ("clamped_relu", 0.3), ("softmax", 0.0)):
        config = ModelConfig(width=16, blocks=1, heads=2, activation=activation, preprocessing="log1p")
        model = TxFM(config, vocabulary)
        initialise(model, statistics=statistics)
        torch.testing.assert_close(model.head.bias, torch.full((40,), start))


def test_a_count_head_changes_no_other_start(vocabulary, tiny_config):
    models = [TxFM(ModelConfig(**{**vars(tiny_config), "count_head": head}), vocabulary) for head in ("none", "zinb")]
    plain, zinb = (model.state_dict() for model in models)
    assert all(torch.equal(plain[name], zinb[name]) for name in plain)
