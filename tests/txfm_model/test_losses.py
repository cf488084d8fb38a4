"""The sparse losses equal the dense ones in value and gradient, give the written numbers, and never see an unmeasured gene."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import NegativeBinomial

from txfm_model.activations import Activation
from txfm_model.config import LoopConfig, LossConfig, ModelConfig, TrainConfig
from txfm_model.losses import Loss, LossParts, measured_mask, poisson_floor, poisson_loss
from txfm_model.model import TxFM
from txfm_model.plain import plain_loss
from txfm_model.prediction import Prediction

KINDS = ("poisson", "mse", "smooth_l1", "nb", "zinb")
ACTIVATIONS = ("rect_tanh", "relu", "clamped_relu", "softmax")


@dataclass
class Target:
    panel_id: torch.Tensor
    target_indptr: torch.Tensor
    target_gene_ids: torch.Tensor
    target_counts: torch.Tensor
    raw_counts: torch.Tensor | None = None
    library_size: torch.Tensor | None = None


def one_sample(counts: list[float], library_size: float = 1e5) -> Target:
    """A sample that measures every gene; with a library of 1e5, normalised and raw counts are the same."""
    genes = [i for i, c in enumerate(counts) if c]
    raw = torch.tensor([counts[i] for i in genes], dtype=torch.float32)
    return Target(
        torch.tensor([0]),
        torch.tensor([0, len(genes)]),
        torch.tensor(genes, dtype=torch.int64),
        raw * (1e5 / library_size),
        raw,
        torch.tensor([library_size], dtype=torch.float64),
    )


def everything(n_genes: int) -> torch.Tensor:
    return torch.ones(1, n_genes, dtype=torch.bool)


def of_counts(k: float, mean: float, dispersion: float, zero_logit: float | None = None) -> LossParts:
    """The likelihood loss of one count."""
    prediction = Prediction(
        torch.tensor([[mean]], dtype=torch.float64).log1p(),
        torch.tensor([dispersion]).log(),
        None if zero_logit is None else torch.tensor([[zero_logit]]),
    )
    return Loss(kind="nb" if zero_logit is None else "zinb")(prediction, one_sample([k]), everything(1))


def random_prediction(seed: int, n: int, n_genes: int) -> Prediction:
    rng = torch.Generator().manual_seed(seed)
    return Prediction(
        torch.rand(n, n_genes, generator=rng) * 7,
        torch.randn(n_genes, generator=rng),
        torch.randn(n, n_genes, generator=rng) * 2,
    )


# log1p target and prediction; the three losses of each pair
WRITTEN = [
    (0.0, 0.2, 1.02140275816017, 0.04, 0.02),
    (math.log(4), 1.1, -1.395833976053567, 0.081964461, 0.040982231),
    (math.log(251), 5.0, -1106.586840897423, 0.276100791, 0.138050396),
]


@pytest.mark.parametrize(("x", "predicted", "poisson", "mse", "smooth_l1"), WRITTEN)
def test_values_written_in_the_specification(x, predicted, poisson, mse, smooth_l1):
    for kind, expected in (("poisson", poisson), ("mse", mse), ("smooth_l1", smooth_l1)):
        parts = Loss(kind=kind)(Prediction(torch.tensor([[predicted]])), one_sample([math.expm1(x)]), everything(1))
        assert parts.loss.item() == pytest.approx(expected, rel=3e-6), kind


def test_sums_written_in_the_specification():
    target = one_sample([math.expm1(x) for x, *_ in WRITTEN])
    predicted = torch.tensor([[p for _, p, *_ in WRITTEN]])
    for parts in (poisson_loss(predicted, target, everything(3)), Loss()(Prediction(predicted), target, everything(3))):
        assert parts.sum_B.item() == pytest.approx(-1106.9612721153162, rel=1e-6)
        assert parts.loss.item() == pytest.approx(-1106.9612721153162 / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("k", "mean", "dispersion", "expected", "slope"),
    [(3, 2.0, 0.5, 2.637300420, -0.1), (0, 2.0, 0.5, 0.804718956, 0.2), (7, 2.0, 10.0, 5.020660588, -2.083333333)],
)
def test_negative_binomial_numbers(k, mean, dispersion, expected, slope):
    assert of_counts(k, mean, dispersion).loss.item() == pytest.approx(expected, rel=1e-6)
    log1p = torch.tensor([[mean]]).log1p().requires_grad_()
    loss = Loss(kind="nb")(Prediction(log1p, torch.tensor([dispersion]).log()), one_sample([k]), everything(1)).loss
    (got,) = torch.autograd.grad(loss, log1p)
    assert got.item() == pytest.approx(slope * (mean + 1), rel=1e-5)  # d mean / d log1p is mean + 1
    poisson_slope = 1 - k / mean
    assert slope == pytest.approx(poisson_slope * dispersion / (mean + dispersion), rel=1e-8)


def test_negative_binomial_with_size_factors():
    """Counts (2, 0, 8) of a library of 10: s = 1e-4."""
    prediction = Prediction(
        torch.tensor([[2e4, 100, 7e4]], dtype=torch.float64).log1p(), torch.tensor([1.0, 2.0, 5.0]).log()
    )
    target = one_sample([2, 0, 8], library_size=10)
    parts = Loss(kind="nb")(prediction, target, everything(3))
    assert parts.sum_B.item() == pytest.approx(4.404275518, rel=2e-6)
    for gene, expected in enumerate((1.909542505, 0.009975083, 2.484757930)):
        only = torch.zeros(1, 3, dtype=torch.bool)
        only[0, gene] = True
        count = [2, 0, 8][gene]
        alone = one_sample([count if i == gene else 0 for i in range(3)], library_size=10)
        assert Loss(kind="nb")(prediction, alone, only).loss.item() == pytest.approx(expected, rel=3e-6)
    unscaled = Loss(kind="nb", scale_library=False)(prediction, target, everything(3))
    raw = Loss(kind="nb")(prediction, replace(target, library_size=torch.tensor([1e5]).double()), everything(3))
    assert torch.equal(unscaled.mean_B, raw.mean_B)


@pytest.mark.parametrize(
    ("k", "mean", "dispersion", "logit", "expected"),
    [
        (0, 2.0, 0.5, 0.0, 0.323507131),
        (3, 2.0, 0.5, 0.0, 3.330447601),
        (0, 50.0, 0.5, 2.0, 0.113551513),
        (0, 50.0, 0.5, -2.0, 1.575783107),
    ],
)
def test_zero_inflated_numbers(k, mean, dispersion, logit, expected):
    assert of_counts(k, mean, dispersion, logit).loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("logit", "ceiling"), [(2.0, 0.126928), (-2.0, 2.126928)])
def test_a_zero_costs_at_most_its_inflation(logit, ceiling):
    assert of_counts(0, 1e5, 8.0, logit).loss.item() == pytest.approx(ceiling, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_likelihoods_are_those_of_scipy_and_torch(seed):
    rng = np.random.default_rng(seed)
    n = 200
    dispersion, mean = np.exp(rng.normal(0, 2, n)), np.exp(rng.normal(1, 2, n))
    counts = rng.negative_binomial(dispersion, dispersion / (dispersion + mean)) * (rng.random(n) < 0.8)
    logit, factor = rng.normal(0, 2, n), 0.05
    prediction = Prediction(
        torch.from_numpy(np.log1p(mean / factor))[None].float(),
        torch.from_numpy(np.log(dispersion)).float(),
        torch.from_numpy(logit)[None].float(),
    )
    target = one_sample(counts.tolist(), library_size=factor * 1e5)
    likelihood = scipy.stats.nbinom.logpmf(counts, dispersion, dispersion / (dispersion + mean))
    by_torch = NegativeBinomial(
        torch.from_numpy(dispersion), probs=torch.from_numpy(mean / (mean + dispersion))
    ).log_prob(torch.from_numpy(counts).double())
    assert Loss(kind="nb")(prediction, target, everything(n)).sum_B.item() == pytest.approx(-likelihood.sum(), rel=1e-5)
    assert by_torch.sum().item() == pytest.approx(likelihood.sum(), rel=1e-9)
    inflation = 1 / (1 + np.exp(-logit))
    inflated = np.where(
        counts == 0, np.log(inflation + (1 - inflation) * np.exp(likelihood)), np.log1p(-inflation) + likelihood
    )
    assert Loss(kind="zinb")(prediction, target, everything(n)).sum_B.item() == pytest.approx(-inflated.sum(), rel=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sparse_loss_equals_the_dense_one_in_value_and_gradient(make_batch, kind, activation):
    """For random panels, one of them empty, one sample without counts; the dense form in float64 and without NaN."""
    config = ModelConfig(activation=activation, target_sum=5e3 if activation == "softmax" else 1e5)
    loss = Loss.of_parts(LossConfig(kind=kind), config)
    for seed in range(4):
        batch, panels_NG = make_batch(seed, n=7)
        batch, panels_NG = with_an_empty_panel(batch, panels_NG)
        measured_BG = measured_mask(batch.panel_id, panels_NG)
        _, log_dispersion_G, zero_logits_BG = random_prediction(seed, 7, panels_NG.shape[1])
        logits_BG = torch.randn(zero_logits_BG.shape, generator=torch.Generator().manual_seed(seed)) * 2 + 3
        poison_BG = torch.where(measured_BG, 0.0, torch.nan)
        values = []
        for dtype, poison in ((torch.float32, poison_BG), (torch.float64, 0.0)):
            leaves = [(x.to(dtype)).requires_grad_() for x in (logits_BG, log_dispersion_G, zero_logits_BG)]
            log1p_BG = Activation.of(config)(leaves[0], measured_BG if poison is poison_BG else fill_empty(measured_BG))
            prediction = Prediction(log1p_BG + poison, leaves[1], leaves[2] + poison if kind == "zinb" else None)
            parts = (loss if poison is poison_BG else plain(loss))(prediction, batch, panels_NG)
            slopes = torch.autograd.grad(parts.loss, leaves, allow_unused=True)
            values.append((parts, slopes))
        (got, got_slopes), (want, want_slopes) = values
        for ours, theirs in ((got.mean_B, want.mean_B), (got.sum_B, want.sum_B), (got.floor_B, want.floor_B)):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())
        for ours, theirs in zip(got_slopes, want_slopes, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-6 * theirs.abs().max().item())
        assert not got_slopes[0][~measured_BG].any()
        assert got.mean_B[0] == got.sum_B[0] == got.floor_B[0] == 0


def plain(loss: Loss):
    return lambda *arguments: plain_loss(loss, *arguments)


def with_an_empty_panel(batch, panels_NG):
    """The first sample measures nothing, the second measures genes and has no counts."""
    panels_NG = torch.cat([panels_NG, torch.zeros(1, panels_NG.shape[1], dtype=torch.bool)])
    panel_id, cut = batch.panel_id.clone(), int(batch.target_indptr[2])
    panel_id[0] = len(panels_NG) - 1
    indptr = (batch.target_indptr - cut).clamp_min(0)
    kept = {name: getattr(batch, name)[cut:] for name in ("target_gene_ids", "target_counts", "raw_counts")}
    return replace(batch, panel_id=panel_id, target_indptr=indptr, **kept), panels_NG


def fill_empty(measured_BG: torch.Tensor) -> torch.Tensor:
    """Where nothing is measured, everything: the plain softmax has no value there."""
    return torch.where(measured_BG.any(1, keepdim=True), measured_BG, True)


@pytest.mark.parametrize(("count", "floor"), [(0.0, 1.0), (3.0, -1.545177), (1000.0, -5914.663534)])
def test_the_floor(count, floor):
    assert poisson_floor(torch.tensor(count, dtype=torch.float64)).item() == pytest.approx(floor, abs=1e-6)


@pytest.mark.parametrize("kind", ["poisson", "mse", "smooth_l1", "nb"])
def test_a_perfect_prediction_has_no_excess(make_batch, kind):
    for seed in range(4):
        batch, panels_NG = make_batch(seed)
        perfect_BG = torch.zeros(len(batch), panels_NG.shape[1])
        rows = torch.arange(len(batch)).repeat_interleave(batch.target_indptr.diff())
        counts = batch.raw_counts if kind == "nb" else batch.target_counts
        perfect_BG[rows, batch.target_gene_ids] = counts.log1p()
        loss = Loss(kind=kind, scale_library=False)
        dispersion_G = torch.linspace(-2, 2, panels_NG.shape[1])
        parts = loss(Prediction(perfect_BG, dispersion_G), batch, panels_NG)
        assert parts.excess_B.abs().max() <= 2e-6 * parts.floor_B.abs().max() + 1e-5
        assert (loss(Prediction(perfect_BG + 0.1, dispersion_G), batch, panels_NG).excess_B > 0).all()


def test_floors_of_likelihoods_are_reached_at_the_count():
    for k, dispersion in ((3.0, 0.5), (40.0, 2.0)):
        parts = of_counts(k, k, dispersion)
        assert parts.floor_B.item() == pytest.approx(parts.loss.item(), rel=1e-6)
        inflated = of_counts(k, k, dispersion, -30.0)
        assert inflated.floor_B.item() == pytest.approx(parts.floor_B.item(), rel=1e-6)
        assert inflated.excess_B.item() == pytest.approx(0, abs=1e-5)
    assert of_counts(0, 0.0, 2.0).floor_B.item() == 0
    assert of_counts(0, 0.0, 2.0).loss.item() == pytest.approx(0, abs=1e-7)
    assert of_counts(0, 5.0, 2.0, 30.0).excess_B.item() == pytest.approx(0, abs=1e-7)


def test_the_floor_passes_no_gradient(make_batch):
    batch, panels_NG = make_batch(0)
    prediction = random_prediction(0, 6, panels_NG.shape[1])
    prediction = Prediction(*(tensor.requires_grad_() for tensor in prediction))
    for kind in KINDS:
        assert not Loss(kind=kind)(prediction, batch, panels_NG).floor_B.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_genes_outside_the_panel_are_never_seen(make_batch, kind):
    batch, panels_NG = make_batch(0)
    panels_NG[:, 7] = False  # gene 7 is measured nowhere
    batch = without_gene(batch, 7)
    measured_BG = measured_mask(batch.panel_id, panels_NG)
    clean = random_prediction(3, 6, panels_NG.shape[1])
    log_dispersion_G = clean.log_dispersion_G.clone()
    log_dispersion_G[7] = torch.nan
    poison_BG = torch.where(measured_BG, 0.0, torch.nan)
    leaves = [clean.log1p_BG + poison_BG, log_dispersion_G, clean.zero_logits_BG + poison_BG]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    parts = Loss(kind=kind)(Prediction(*leaves), batch, panels_NG)
    other = Prediction(
        torch.where(measured_BG, clean.log1p_BG, 11.0),
        clean.log_dispersion_G,
        torch.where(measured_BG, clean.zero_logits_BG, 5.0),
    )
    assert torch.equal(parts.mean_B, Loss(kind=kind)(other, batch, panels_NG).mean_B)
    slopes = torch.autograd.grad(parts.loss, leaves, allow_unused=True)
    assert not slopes[0][~measured_BG].any()
    assert (slopes[0][measured_BG] != 0).all()
    assert (slopes[1] is None) == (kind not in ("nb", "zinb"))
    if slopes[1] is not None:
        assert slopes[1][7] == 0
        assert torch.isfinite(slopes[1]).all()
    if kind == "zinb":
        assert not slopes[2][~measured_BG].any()


def without_gene(batch, gene: int):
    keep = batch.target_gene_ids != gene
    kept_before = torch.cat([torch.zeros(1, dtype=torch.int64), keep.long().cumsum(0)])
    return replace(
        batch,
        gene_ids=torch.where(batch.gene_ids == gene, 0, batch.gene_ids),
        target_indptr=kept_before[batch.target_indptr],
        target_gene_ids=batch.target_gene_ids[keep],
        target_counts=batch.target_counts[keep],
        raw_counts=batch.raw_counts[keep],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_unmeasured_gene_gets_exactly_zero_gradient_in_the_whole_model(make_batch, tiny_config, vocabulary, kind):
    batch, panels_NG = make_batch(1, n_panels=2)
    panels_NG[:, 7] = False
    batch = without_gene(batch, 7)
    loss = Loss(kind=kind)
    config = replace(tiny_config, count_head=kind if kind in ("nb", "zinb") else "none")
    model = TxFM(config, vocabulary).train()
    loss(model(batch.gene_ids, batch.values, batch.n_unmasked), batch, panels_NG).loss.backward()
    of_genes = {name: p.grad for name, p in model.named_parameters() if len(p) == len(vocabulary)}
    assert len(of_genes) == {"nb": 4, "zinb": 6}.get(kind, 3)
    for gradient in of_genes.values():
        assert not gradient[7].any()
    assert model.head.weight.grad[0].any()
    assert model.head.bias.grad[0] != 0


def test_samples_without_counts_and_empty_targets():
    batch = Target(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1, 1]), torch.tensor([2]), torch.tensor([5.0]))
    panels_NG = torch.tensor([[True, False, True], [False, False, False]])
    parts = poisson_loss(torch.zeros(3, 3), batch, panels_NG)
    torch.testing.assert_close(parts.mean_B, torch.tensor([1.0, 1.0, 0.0]))  # the third sample measures nothing
    torch.testing.assert_close(parts.floor_B, torch.tensor([1.0, (1 + 6 * (1 - math.log(6))) / 2, 0.0]))
    nothing = one_sample([0, 0, 0])
    for kind in KINDS:
        prediction = Prediction(torch.zeros(1, 3), torch.zeros(3), torch.full((1, 3), 30.0))
        assert Loss(kind=kind)(prediction, nothing, panels_NG).excess_B.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("kind", ["nb", "zinb"])
@pytest.mark.parametrize("log_dispersion", [-100.0, -16.0, 0.0, 16.0, 100.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_likelihoods_are_finite(kind, log_dispersion, activation):
    """Means of exactly 0 and of the largest prediction, counts of 1 and of 3 million, dispersions of any size."""
    logits = torch.tensor([[-5.0, 0.0, 1e-6, 1e-3, 1.0, 11.0, 50.0] * 3], requires_grad=True)
    counts = [0.0] * 7 + [1.0] * 7 + [3e6] * 7
    config = ModelConfig(activation=activation)
    log_dispersion_G = torch.full((21,), log_dispersion, requires_grad=True)
    zero_logits_BG = torch.linspace(-40, 40, 21)[None].requires_grad_()
    for library_size in (30.0, 3e7):
        prediction = Prediction(Activation.of(config)(logits), log_dispersion_G, zero_logits_BG)
        parts = Loss(kind=kind)(prediction, one_sample(counts, library_size), everything(21))
        assert torch.isfinite(parts.mean_B).all()
        assert torch.isfinite(parts.floor_B).all()
        slopes = torch.autograd.grad(parts.loss, [logits, log_dispersion_G, zero_logits_BG], allow_unused=True)
        assert all(slope is None or torch.isfinite(slope).all() for slope in slopes)


def test_large_dispersions_are_computed_to_the_digit():
    """Near Poisson the gamma functions all but cancel: in float32 nothing would be left of these."""
    for k, mean, dispersion in ((3, 2.0, 1e6), (40, 35.0, 5e5), (3000, 2900.0, 1e4)):
        expected = -scipy.stats.nbinom.logpmf(k, dispersion, dispersion / (dispersion + mean))
        assert of_counts(k, mean, dispersion).loss.item() == pytest.approx(expected, rel=1e-4)
    log_dispersion = torch.tensor([math.log(1e4)], requires_grad=True)
    loss = Loss(kind="nb")(Prediction(torch.tensor([[2.0]]).log1p(), log_dispersion), one_sample([3]), everything(1))
    (got,) = torch.autograd.grad(loss.loss, log_dispersion)
    in_float64 = log_dispersion.detach().double().requires_grad_()
    distribution = NegativeBinomial(in_float64.exp(), logits=math.log(2) - in_float64)
    (want,) = torch.autograd.grad(-distribution.log_prob(torch.tensor(3.0).double()), in_float64)
    assert got.item() == pytest.approx(want.item(), rel=1e-2)  # 1e-4, of terms near 1
    assert got.item() != 0


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_likelihoods_refuse_batches_without_counts_and_models_without_parameters(make_batch, kind):
    batch, panels_NG = make_batch(0)
    prediction = random_prediction(0, 6, panels_NG.shape[1])
    with pytest.raises(ValueError, match=f"loss {kind} is a likelihood of raw counts.*raw_counts=True"):
        Loss(kind=kind)(prediction, replace(batch, raw_counts=None), panels_NG)
    with pytest.raises(ValueError, match=f"model.count_head {kind}.*no dispersion"):
        Loss(kind=kind)(Prediction(prediction.log1p_BG), batch, panels_NG)
    if kind == "zinb":
        with pytest.raises(ValueError, match="no zero inflation"):
            Loss(kind=kind)(prediction._replace(zero_logits_BG=None), batch, panels_NG)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_float32_under_autocast(make_batch, kind):
    batch, panels_NG = make_batch(2)
    prediction, loss = random_prediction(1, 6, panels_NG.shape[1]), Loss(kind=kind)
    plain_parts = loss(prediction, batch, panels_NG)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(prediction, batch, panels_NG)
    assert under.mean_B.dtype == under.sum_B.dtype == under.floor_B.dtype == torch.float32
    assert torch.equal(under.mean_B, plain_parts.mean_B)
    rounded = Prediction(*(tensor.bfloat16() for tensor in prediction))
    assert loss(rounded, batch, panels_NG).mean_B.dtype == torch.float32


def test_the_mean_is_over_genes_first_then_over_samples():
    """A bulk sample with many genes must not outweigh a cell with few; with a sum it does."""
    panels_NG = torch.tensor([[True] * 4, [True] + [False] * 3])
    batch = Target(torch.tensor([0, 1]), torch.tensor([0, 0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0))
    predicted_BG = torch.stack([torch.full((4,), 2.0), torch.full((4,), 1.0)])
    first, second = math.exp(2) - 2, math.exp(1) - 1
    mean = Loss(reduction="mean")(Prediction(predicted_BG), batch, panels_NG)
    assert mean.loss.item() == pytest.approx(np.mean([first, second]), rel=1e-6)
    total = Loss(reduction="sum")(Prediction(predicted_BG), batch, panels_NG)
    assert total.loss.item() == pytest.approx(np.mean([4 * first, second]), rel=1e-6)
    assert torch.equal(total.mean_B, mean.mean_B)
    assert torch.equal(total.excess_B, mean.excess_B)  # of the mean, whatever is trained on
    assert torch.equal(total.loss_B, total.sum_B)


def test_the_loss_of_a_configuration():
    config = TrainConfig(
        shards="s", out="o", loss=LossConfig(kind="zinb", reduction="sum"),
        model=ModelConfig(target_sum=1e4, preprocessing="log1p"), loop=LoopConfig(steps=1),
    )  # fmt: skip
    assert Loss.of(config) == Loss(kind="zinb", reduction="sum", target_sum=1e4, scale_library=False)
    assert Loss.of_parts(LossConfig(), ModelConfig()) == Loss()
