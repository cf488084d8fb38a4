"""Activations give the numbers of their definition, and their inverses undo them."""

import math

import pytest
import torch

from txfm_model.activations import (
    LOGIT_SCALE,
    Activation,
    clamped_relu,
    rectified_tanh,
    rectified_tanh_inverse,
    softmax_of_measured,
)
from txfm_model.config import ModelConfig
from txfm_model.losses import poisson_loss

NAMES = ("rect_tanh", "relu", "clamped_relu", "softmax")

# logit, activation, its derivative, Poisson loss and its derivative for the target x = ln 4
TABLE = [
    (-1.0, 0.0, 0.0, 1.0, 0.0),
    (0.0, 0.0, 0.0, 1.0, 0.0),
    (0.5, 0.529048674, 1.056607175, -0.418878, -2.433032),
    (1.0, 1.055867740, 1.049937152, -1.349003, -1.181737),
    (4.0, 4.054113178, 0.927547157, 41.417576, 49.748091),
    (10.0, 8.355568186, 0.501129214, 4220.378601, 2129.699370),
    (30.0, 11.420899723, 0.016861362, 91162.483448, 1537.826508),
    (60.0, 11.512564640, 0.000068208, 99917.873769, 6.818097),
]


@pytest.mark.parametrize(("z", "value", "slope", "loss", "loss_slope"), TABLE)
def test_the_rectified_tanh_and_its_slope(z, value, slope, loss, loss_slope):
    logit = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    activation = rectified_tanh(logit, 1e5)
    (derivative,) = torch.autograd.grad(activation, logit)
    assert activation.item() == pytest.approx(value, abs=1e-9)
    assert derivative.item() == pytest.approx(slope, abs=1e-9)
    by_sigmoid = math.log1p(1e5) * max(0.0, 2 / (1 + math.exp(-z / (2 * math.e))) - 1)
    assert activation.item() == pytest.approx(by_sigmoid, abs=1e-12)


class OneGene:
    panel_id = torch.tensor([0])
    target_indptr = torch.tensor([0, 1])
    target_gene_ids = torch.tensor([0])
    target_counts = torch.tensor([3.0])  # ln(1 + 3) = ln 4


@pytest.mark.parametrize(("z", "value", "slope", "loss", "loss_slope"), TABLE)
def test_the_loss_of_a_logit_and_its_slope(z, value, slope, loss, loss_slope):
    logit = torch.tensor([[z]], dtype=torch.float64, requires_grad=True)
    got = poisson_loss(rectified_tanh(logit, 1e5), OneGene(), torch.ones(1, 1, dtype=torch.bool)).loss
    (derivative,) = torch.autograd.grad(got, logit)
    assert got.item() == pytest.approx(loss, rel=2e-6, abs=1e-6)  # the loss is computed in float32
    assert derivative.item() == pytest.approx(loss_slope, rel=1e-5, abs=1e-6)


def test_the_slope_above_zero():
    assert pytest.approx(10.87312731383618, abs=1e-14) == LOGIT_SCALE
    assert math.log1p(1e5) / LOGIT_SCALE == pytest.approx(1.0588430662694335, abs=1e-15)
    logit = torch.tensor([1e-9], dtype=torch.float64, requires_grad=True)
    for scale, slope in ((LOGIT_SCALE, 1.0588430662694335), (math.log1p(1e5), 1.0), (3.0, math.log1p(1e5) / 3)):
        (derivative,) = torch.autograd.grad(rectified_tanh(logit, 1e5, scale), logit)
        assert derivative.item() == pytest.approx(slope, rel=1e-12)
    assert math.expm1(LOGIT_SCALE) == pytest.approx(52_739, abs=1)  # the target sum at which 4e has slope 1


def test_a_general_scale():
    config = ModelConfig(tanh_scale=7.0, target_sum=1e4)
    z = torch.tensor([-3.0, 0.0, 2.0, 9.0], dtype=torch.float64)
    expected = [math.log1p(1e4) * max(0.0, math.tanh(value / 7)) for value in z.tolist()]
    torch.testing.assert_close(Activation.of(config)(z), torch.tensor(expected, dtype=torch.float64))
    assert Activation.of(ModelConfig()).scale == LOGIT_SCALE


def test_clamped_relu_and_softmax_of_the_specification():
    z = torch.tensor([[-1.0, 0.5, 3.0, 20.0]], dtype=torch.float64)
    torch.testing.assert_close(clamped_relu(z, 1e5), torch.tensor([[0, 0.5, 3, 11.51293546492023]]).double())
    shared = torch.tensor([[7.582273e-5, 3.397690e-4, 4.131392e-3, 11.512935419]], dtype=torch.float64)
    torch.testing.assert_close(softmax_of_measured(z, 1e5), shared, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "slopes"), [("relu", [0, 0, 1, 1]), ("clamped_relu", [0, 0, 1, 0])])
def test_slopes_of_the_rectifiers(name, slopes):
    z = torch.tensor([-1.0, 0.0, 3.0, 20.0], requires_grad=True)
    (derivative,) = torch.autograd.grad(Activation(name, 1e5)(z).sum(), z)
    assert derivative.tolist() == slopes


def test_measured_genes_share_the_counts():
    measured_BG = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    logits_BG = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    poisoned_BG = torch.where(measured_BG, logits_BG, torch.nan).requires_grad_()
    log1p_BG = softmax_of_measured(poisoned_BG, 1e5, measured_BG)
    torch.testing.assert_close(log1p_BG.expm1().sum(1), torch.tensor([1e5, 0, 1e5], dtype=torch.float64))
    torch.testing.assert_close(log1p_BG[0, [0, 2, 3]], softmax_of_measured(logits_BG[:1, [0, 2, 3]], 1e5)[0])
    torch.testing.assert_close(log1p_BG[2], softmax_of_measured(logits_BG[2:], 1e5)[0])
    assert not log1p_BG[~measured_BG].any()
    (slope,) = torch.autograd.grad(log1p_BG.square().sum(), poisoned_BG)
    assert not slope[~measured_BG].any()
    assert (slope[measured_BG] != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_inverse(name):
    activation = Activation(name, 1e5, scale=5.0)
    x = torch.linspace(0, 11.5, 24, dtype=torch.float64)
    found = activation(activation.inverse(x))
    if name == "softmax":  # counts that do not add up to L are all changed by one factor
        shares = x.expm1().clamp_min(0.01)
        torch.testing.assert_close(found.expm1(), 1e5 * shares / shares.sum())
    else:
        torch.testing.assert_close(found, x)
    torch.testing.assert_close(rectified_tanh(rectified_tanh_inverse(x, 1e5), 1e5), x)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="'gelu' is none of rect_tanh"):
        Activation("gelu", 1e5)(torch.zeros(1))
