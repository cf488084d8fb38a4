"""The losses over measured genes, read from a sparse target.

Each is a sum over the panel of what a count of 0 costs, (B, G), and a sum over the counts above 0, (nnz,), of what they
cost beyond that: no target of (B, G) is made. All is in float32 also under autocast, the second sum in float64.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, assert_never, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from txfm_model.config import LossConfig, ModelConfig, TrainConfig
from txfm_model.prediction import Prediction

if TYPE_CHECKING:
    from collections.abc import Callable

LEAST_MEAN = 1e-8
"""Least mean of a model of counts, in counts: a rectified activation can predict 0, whose logarithm is -infinity."""
LOG_DISPERSION_BOUND = 16.0
"""ln θ is taken within ± this, θ from 1e-7 to 9e6: beyond, the distribution no longer changes and float32 ends."""


class Target(Protocol):
    """What the loss reads of a batch (`shards.stream.MaskedBatch` has it)."""

    @property
    def panel_id(self) -> Tensor:
        """(B,) int64. Row of the table of panels."""

    @property
    def target_indptr(self) -> Tensor:
        """(B + 1,) int64. Start of each sample in the arrays below."""

    @property
    def target_gene_ids(self) -> Tensor:
        """(nnz,) int64. Genes with a count above zero, all inside the panel."""

    @property
    def target_counts(self) -> Tensor:
        """(nnz,) float32. Normalised counts L c / library size, not logged."""


@runtime_checkable
class CountTarget(Target, Protocol):
    """What losses of raw counts read beside that."""

    @property
    def raw_counts(self) -> Tensor | None:
        """(nnz,) float32. The counts themselves."""

    @property
    def library_size(self) -> Tensor:
        """(B,) float64. Counts of the whole library."""


@dataclass(frozen=True)
class LossParts:
    """Loss of each sample of a batch.

    mean_B : (B,) float32. Mean over the sample's measured genes.
    sum_B : (B,) float32. Sum over the sample's measured genes.
    floor_B : (B,) float32. What `mean_B` would be for a perfect prediction.
    reduction : which of the first two is trained on.
    """

    mean_B: Tensor
    sum_B: Tensor
    floor_B: Tensor
    reduction: Literal["mean", "sum"] = "mean"

    @property
    def loss_B(self) -> Tensor:
        """What is trained on, of each sample."""
        return self.mean_B if self.reduction == "mean" else self.sum_B

    @property
    def loss(self) -> Tensor:
        """The loss that is trained on: mean or sum over genes, then mean over samples."""
        return self.loss_B.mean()

    @property
    def excess_B(self) -> Tensor:
        """Mean loss above the floor: comparable between datasets, unlike the loss itself."""
        return self.mean_B - self.floor_B


def measured_mask(panel_id_B: Tensor, panels_NG: Tensor) -> Tensor:
    """Which genes enter the loss: row `panel_id` of the table of panels, (B, G) bool."""
    return panels_NG[panel_id_B]


def poisson_floor(counts: Tensor) -> Tensor:
    """Lowest Poisson loss at a normalised count, (c + 1) (1 - ln(c + 1)): 1 where the count is 0."""
    return (counts + 1) * (1 - torch.log1p(counts))


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Loss of predictions; call it on a prediction, its batch and the table of panels.

    kind : as `LossConfig.kind`.
    reduction : whether the mean or the sum over a sample's measured genes is trained on.
    target_sum : L, counts.
    scale_library : whether counts are scaled to L; if not, the mean count that nb and zinb compare is the predicted one.
    """

    kind: Literal["poisson", "mse", "smooth_l1", "nb", "zinb"] = "poisson"
    reduction: Literal["mean", "sum"] = "mean"
    target_sum: float = 1e5
    scale_library: bool = True

    @classmethod
    def of(cls, config: TrainConfig) -> "Loss":
        """The loss of a run."""
        return cls.of_parts(config.loss, config.model)

    @classmethod
    def of_parts(cls, loss: LossConfig, model: ModelConfig) -> "Loss":
        """The loss that `loss` names, for models of the configuration `model`."""
        return cls(
            kind=loss.kind,
            reduction=loss.reduction,
            target_sum=model.target_sum,
            scale_library=model.preprocessing == "library_log1p",
        )

    def __call__(self, prediction: Prediction, batch: Target, panels_NG: Tensor) -> LossParts:
        """Loss of each sample over its measured genes.

        Genes outside a sample's panel are blanked before anything is computed: no value or gradient of theirs passes,
        nor NaN.

        Parameters
        ----------
        prediction
            What the model predicts of the batch.
        batch
            Panel and target of each sample; for nb and zinb a `CountTarget`.
        panels_NG
            (N, G) bool. Which genes each panel measures.

        Raises
        ------
        ValueError
            If nb or zinb get no raw counts, or no parameters of theirs in `prediction`.
        """
        with torch.autocast(prediction.log1p_BG.device.type, enabled=False):
            places = _Places.of(batch, panels_NG)
            log1p_BG = prediction.log1p_BG.float().masked_fill(~places.measured_BG, 0.0)
            match self.kind:
                case "poisson":
                    sum_B, floor_sum_B = _poisson(log1p_BG, places)
                case "mse" | "smooth_l1":
                    sum_B, floor_sum_B = _distance(log1p_BG, places, self.kind)
                case "nb" | "zinb":
                    sum_B, floor_sum_B = self._of_counts(log1p_BG, prediction, batch, places)
                case _:
                    assert_never(self.kind)
            per_gene_B = places.n_measured_B.clamp_min(1)  # an empty panel has loss 0
            return LossParts(sum_B / per_gene_B, sum_B, floor_sum_B / per_gene_B, self.reduction)

    def _of_counts(
        self, log1p_BG: Tensor, prediction: Prediction, batch: Target, places: "_Places"
    ) -> tuple[Tensor, Tensor]:
        raw_counts = getattr(batch, "raw_counts", None)
        if raw_counts is None or not isinstance(batch, CountTarget):
            raise ValueError(
                f"loss {self.kind} is a likelihood of raw counts, and this batch has none; make its stream with "
                f"raw_counts=True, from a corpus of counts"
            )
        if prediction.log_dispersion_G is None or (self.kind == "zinb" and prediction.zero_logits_BG is None):
            raise ValueError(
                f"loss {self.kind} needs a model with model.count_head {self.kind}: this one predicts no "
                f"{'dispersion' if prediction.log_dispersion_G is None else 'zero inflation'}"
            )
        size_factor_B = batch.library_size.double() / self.target_sum if self.scale_library else None
        # A gene that no sample measures must not pass its dispersion on, whatever that is.
        any_measured_G = places.measured_BG.any(0)
        log_dispersion_G = prediction.log_dispersion_G.float().masked_fill(~any_measured_G, 0.0)
        mean_BG = mean_counts(log1p_BG, size_factor_B)
        if self.kind == "nb" or prediction.zero_logits_BG is None:
            return _negative_binomial(mean_BG, log_dispersion_G, None, raw_counts, places)
        zero_logits_BG = prediction.zero_logits_BG.float().masked_fill(~places.measured_BG, 0.0)
        return _negative_binomial(mean_BG, log_dispersion_G, zero_logits_BG, raw_counts, places)


def poisson_loss(predicted_BG: Tensor, batch: Target, panels_NG: Tensor) -> LossParts:
    """Poisson loss of predicted log1p values, e^x̂ - (c + 1) x̂ for each measured gene; see `Loss`.

    Parameters
    ----------
    predicted_BG
        (B, G). Predicted log1p values.
    batch
        Panel and target of each sample.
    panels_NG
        (N, G) bool. Which genes each panel measures.
    """
    return Loss(kind="poisson")(Prediction(predicted_BG), batch, panels_NG)


@dataclass(frozen=True)
class _Places:
    """Where measured genes and counts above zero are in (B, G), and the sums over them."""

    measured_BG: Tensor
    n_measured_B: Tensor
    row: Tensor  # (nnz,) int64, sample of each count in the batch
    gene: Tensor  # (nnz,) int64
    counts: Tensor  # (nnz,) float32, normalised

    @classmethod
    def of(cls, batch: Target, panels_NG: Tensor) -> "_Places":
        measured_BG = measured_mask(batch.panel_id, panels_NG)
        lengths_B = batch.target_indptr.diff()
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        return cls(
            measured_BG=measured_BG,
            n_measured_B=measured_BG.sum(1),
            row=rows_B.repeat_interleave(lengths_B, output_size=len(batch.target_counts)),
            gene=batch.target_gene_ids.long(),
            counts=batch.target_counts.float(),
        )

    def at_counts(self, values_BG: Tensor) -> Tensor:
        """Values of (B, G) where a count is above zero, (nnz,)."""
        return values_BG[self.row, self.gene]

    def sum_of_counts(self, values: Tensor) -> Tensor:
        """Sum of (nnz,) values over each sample, (B,) float64: they are added one by one."""
        sums_B = torch.zeros(len(self.n_measured_B), dtype=torch.float64, device=values.device)
        return sums_B.index_add(0, self.row, values.double())


def _poisson(log1p_BG: Tensor, places: _Places) -> tuple[Tensor, Tensor]:
    """Σ_panel (e^x̂ - x̂) - Σ_nonzero c x̂, and the sum of the lowest losses; each (B,) float32."""
    n_blank_B = log1p_BG.shape[1] - places.n_measured_B  # each gave e^0 - 0
    zeros_part_B = (log1p_BG.exp() - log1p_BG).sum(1) - n_blank_B
    counts_part_B = places.sum_of_counts(places.counts * places.at_counts(log1p_BG))
    floor_B = places.n_measured_B + places.sum_of_counts(poisson_floor(places.counts) - 1)
    return (zeros_part_B - counts_part_B).float(), floor_B.float()


def _distance(log1p_BG: Tensor, places: _Places, kind: Literal["mse", "smooth_l1"]) -> tuple[Tensor, Tensor]:
    """Σ_panel d(x̂) + Σ_nonzero (d(x̂ - x) - d(x̂)) of log1p values, and 0; each (B,) float32."""
    distance: Callable[[Tensor], Tensor] = torch.square if kind == "mse" else _smooth_l1
    predicted = places.at_counts(log1p_BG)
    counts_part_B = places.sum_of_counts(distance(predicted - places.counts.log1p()) - distance(predicted))
    return (distance(log1p_BG).sum(1) + counts_part_B).float(), torch.zeros_like(counts_part_B).float()


def _smooth_l1(difference: Tensor) -> Tensor:
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")


def mean_counts(log1p_BG: Tensor, size_factor_B: Tensor | None) -> Tensor:
    """Mean raw count that a predicted log1p value stands for, s (e^x̂ - 1 + 1e-8) and at least 1e-8, (B, G) float32.

    `size_factor_B` is s, library size / L, (B,); None is 1.
    """
    mean_BG = log1p_BG.expm1() + LEAST_MEAN
    if size_factor_B is not None:
        mean_BG = mean_BG * size_factor_B.to(mean_BG.dtype)[:, None]
    return mean_BG.clamp_min(LEAST_MEAN)


def _negative_binomial(
    mean_BG: Tensor, log_dispersion_G: Tensor, zero_logits_BG: Tensor | None, raw_counts: Tensor, places: _Places
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of raw counts, and its least value given the dispersions; each (B,) float32.

    A count of 0 costs θ ln(1 + μ / θ); k > 0 costs as much and k ln(1 + θ / μ) + ln[Γ(θ) k! / Γ(k + θ)] beside, in
    float64, since for large θ the gammas all but cancel. With logits of zero inflation π, a 0 has one more way to come
    about, and k > 0 costs -ln(1 - π) more.
    """
    log_dispersion_G = log_dispersion_G.clamp(-LOG_DISPERSION_BOUND, LOG_DISPERSION_BOUND)
    dispersion_G = log_dispersion_G.exp()
    zero_BG = dispersion_G * torch.log1p(mean_BG / dispersion_G)  # -ln of NB's chance of 0

    # As an embedding, whose gradient adds up the samples of a gene in a fixed order.
    dispersion = F.embedding(places.gene, dispersion_G[:, None])[:, 0].double()
    counts = raw_counts.double()
    gammas = torch.lgamma(dispersion) + torch.lgamma(counts + 1) - torch.lgamma(dispersion + counts)
    extra = gammas + counts * torch.log1p(dispersion / places.at_counts(mean_BG).double())
    with torch.no_grad():  # the same at μ = k
        at_k = dispersion * torch.log1p(counts / dispersion) + counts * torch.log1p(dispersion / counts)
        floor_B = places.sum_of_counts(gammas + at_k)
    if zero_logits_BG is not None:
        inflated_BG = F.softplus(-zero_logits_BG) - F.softplus(-zero_logits_BG - zero_BG)
        of_counts = F.softplus(places.at_counts(zero_logits_BG)) + places.at_counts(zero_BG - inflated_BG)
        extra, zero_BG = extra + of_counts, inflated_BG
    zeros_part_B = zero_BG.masked_fill(~places.measured_BG, 0.0).sum(1)
    return (zeros_part_B + places.sum_of_counts(extra)).float(), floor_B.float()
