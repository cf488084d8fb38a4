"""The Poisson loss over measured genes, read from a sparse target."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Target(Protocol):
    """What the loss reads of a batch (`shards.stream.MaskedBatch` has it)."""

    @property
    def panel_id(self) -> Tensor:
        """(B,) int64. Row of the table of panels."""

    @property
    def target_indptr(self) -> Tensor:
        """(B + 1,) int64. Start of each sample in the two arrays below."""

    @property
    def target_gene_ids(self) -> Tensor:
        """(nnz,) int64. Genes with a count above zero, all inside the panel."""

    @property
    def target_counts(self) -> Tensor:
        """(nnz,) float32. Normalised counts L c / library size, not logged."""


@dataclass(frozen=True)
class LossParts:
    """Loss of each sample of a batch.

    mean_B : (B,) float32. Mean over the sample's measured genes.
    sum_B : (B,) float32. Sum over the sample's measured genes.
    floor_B : (B,) float32. What `mean_B` would be for a perfect prediction.
    """

    mean_B: Tensor
    sum_B: Tensor
    floor_B: Tensor

    @property
    def loss(self) -> Tensor:
        """The loss that is trained on: mean over genes, then over samples."""
        return self.mean_B.mean()

    @property
    def excess_B(self) -> Tensor:
        """Loss above the floor: comparable between datasets, unlike the loss itself."""
        return self.mean_B - self.floor_B


def measured_mask(panel_id_B: Tensor, panels_NG: Tensor) -> Tensor:
    """Which genes enter the loss: row `panel_id` of the table of panels, (B, G) bool."""
    return panels_NG[panel_id_B]


def poisson_floor(counts: Tensor) -> Tensor:
    """Lowest loss at a normalised count, (c + 1) (1 - ln(c + 1)): 1 where the count is 0."""
    return (counts + 1) * (1 - torch.log1p(counts))


def poisson_loss(predicted_BG: Tensor, batch: Target, panels_NG: Tensor) -> LossParts:
    """Poisson loss of predicted log1p values, e^x̂ - (c + 1) x̂ for each measured gene, without a dense target.

    The sum over a panel is Σ_panel (e^x̂ - x̂) - Σ_nonzero c x̂, in float32 also under autocast. Genes outside a
    sample's panel are blanked before anything is computed: no value or gradient of theirs passes, nor NaN.

    Parameters
    ----------
    predicted_BG
        (B, G). Predicted log1p values.
    batch
        Panel and target of each sample.
    panels_NG
        (N, G) bool. Which genes each panel measures.
    """
    with torch.autocast(predicted_BG.device.type, enabled=False):
        measured_BG = measured_mask(batch.panel_id, panels_NG)
        n_measured_B = measured_BG.sum(1)
        predicted_BG = predicted_BG.float().masked_fill(~measured_BG, 0.0)
        zeros_part_B = (predicted_BG.exp() - predicted_BG).sum(1) - (~measured_BG).sum(1)  # a blanked gene gave 1

        counts = batch.target_counts.float()
        sample_of_nonzero = _sample_of_nonzero(batch)
        counts_part_B = torch.zeros_like(zeros_part_B).index_add(
            0, sample_of_nonzero, counts * predicted_BG[sample_of_nonzero, batch.target_gene_ids.long()]
        )
        floor_sum_B = n_measured_B.float().index_add(0, sample_of_nonzero, poisson_floor(counts) - 1)

        sum_B = zeros_part_B - counts_part_B
        per_gene_B = n_measured_B.clamp_min(1)  # an empty panel has loss 0
        return LossParts(sum_B / per_gene_B, sum_B, floor_sum_B / per_gene_B)


def _sample_of_nonzero(batch: Target) -> Tensor:
    """Row in the batch of each entry of its target, (nnz,) int64."""
    lengths_B = batch.target_indptr.diff()
    rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
    return rows_B.repeat_interleave(lengths_B, output_size=len(batch.target_counts))
