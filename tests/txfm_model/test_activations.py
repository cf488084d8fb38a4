"""The rectified tanh gives the numbers of its definition, and its inverse undoes it."""

import math

import pytest
import torch

from txfm_model.activations import LOGIT_SCALE, rectified_tanh, rectified_tanh_inverse
from txfm_model.losses import poisson_loss

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
    assert math.log1p(1e5) / LOGIT_SCALE == pytest.approx(1.0588430662694335, abs=1e-15)


def test_the_inverse():
    x = torch.linspace(0, 11.5, 24, dtype=torch.float64)
    torch.testing.assert_close(rectified_tanh(rectified_tanh_inverse(x, 1e5), 1e5), x)
