"""Loss on held-out samples, for the model and for the panel-mean predictor that it has to beat."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from txfm_data.panels import Panels
from txfm_model.launch import Precision, autocast
from txfm_model.losses import Loss, measured_mask
from txfm_model.model import TxFM
from txfm_model.prediction import Prediction
from txfm_model.window import NonFiniteError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from shards.manifest import Corpus
    from shards.stream import MaskedBatch
    from txfm_model.run import Run


PANEL_MEAN = ("panel_mean_loss", "panel_mean_excess")


def validate(run: "Run", step: int) -> dict[str, Any]:
    """Mean loss and excess of the model over the val split, and excess of each dataset; None without samples.

    Raises
    ------
    NonFiniteError
        If it is not finite.
    """
    model = run.model
    if run.is_sharded:
        from txfm_model.fsdp import whole_model

        model = whole_model(model)
    totals_N3 = model_totals(model, run.validation_batches(), run.loss, run.panels_NG, run.precision)
    totals_N3 = run.accelerator.reduce(totals_N3, "sum")
    loss, excess, n_samples = totals_N3.sum(0).tolist()
    if not math.isfinite(loss):
        raise NonFiniteError(f"step {step}: the validation loss is {loss}; training stopped. Lower optim.lr")
    by_panel = [total / n if n else None for _, total, n in totals_N3.tolist()]
    return {
        "loss": loss / n_samples if n_samples else None,
        "excess": excess / n_samples if n_samples else None,
        "excess_by_dataset": _by_dataset(run.corpus, by_panel),
    }


def _by_dataset(corpus: "Corpus", by_panel: list[float | None]) -> dict[str, float | None]:
    """Value of each panel under the names of its datasets, joined by "+" where several share it."""
    names: dict[int, list[str]] = {}
    for dataset in corpus.manifest.datasets:
        names.setdefault(dataset.panel_id, []).append(dataset.name)
    return {"+".join(shared): by_panel[panel_id] for panel_id, shared in names.items()}


@torch.no_grad()
def model_totals(
    model: TxFM, batches: "Iterable[MaskedBatch]", loss: Loss, panels_NG: Tensor, precision: Precision
) -> Tensor:
    """Sum loss and excess over the samples of each panel, and count them, (N, 3) float64; the model is in evaluation mode."""
    device = panels_NG.device
    was_training = model.training
    model.eval()
    totals_N3 = torch.zeros(len(panels_NG), 3, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, precision):
            prediction = model(
                batch.gene_ids,
                batch.values,
                batch.n_unmasked if batch.is_padded else None,
                measured_BG=measured_mask(batch.panel_id, panels_NG),
            )
        parts = loss(prediction, batch, panels_NG)
        of_samples_B3 = torch.stack([parts.loss_B, parts.excess_B, torch.ones_like(parts.loss_B)], dim=1).double()
        totals_N3.index_add_(0, batch.panel_id, of_samples_B3)
    model.train(was_training)
    return totals_N3


def panel_mean_losses(run: "Run") -> dict[str, float | None]:
    """Mean loss and excess of the panel-mean predictor over the val split.

    None for losses of counts, which ask for a dispersion that it does not have, and where values are not scaled: the shards
    hold means of scaled counts.
    """
    config, corpus = run.config, run.corpus
    loss: float | None = None
    excess: float | None = None
    if not config.loss.needs_counts and config.model.preprocessing == "library_log1p":
        batches = run.validation_batches()
        if config.loss.kind == "poisson" and config.loss.reduction == "mean":
            totals = PanelMeanPredictor(corpus.panels, len(corpus.vocabulary)).totals(batches)
        else:
            totals = _dense_panel_mean_totals(run, batches)
        loss, excess = means_over_processes(totals, run.accelerator)
    return dict(zip(PANEL_MEAN, (loss, excess), strict=True))


@torch.no_grad()
def _dense_panel_mean_totals(run: "Run", batches: "Iterable[MaskedBatch]") -> tuple[float, float, int]:
    """Totals of the predictor under any loss of log1p values, through the loss itself."""
    panels, device = run.corpus.panels, run.accelerator.device
    loss = excess = 0.0
    n_samples = 0
    for batch in batches:
        predicted_BG = np.zeros((len(batch), len(run.corpus.vocabulary)), np.float32)
        for row_G, panel_id in zip(predicted_BG, batch.panel_id.tolist(), strict=True):
            entries = slice(panels.indptr[panel_id], panels.indptr[panel_id + 1])
            row_G[panels.gene_ids[entries]] = np.log1p(panels.mean_normalized[entries])
        prediction = Prediction(torch.from_numpy(predicted_BG).to(device), None, None)
        parts = run.loss(prediction, batch.to(device), run.panels_NG)
        loss += float(parts.loss_B.double().sum())
        excess += float(parts.excess_B.double().sum())
        n_samples += len(batch)
    return loss, excess, n_samples


class PanelMeanPredictor:
    """Predicts each gene's mean over the panel's train samples: the best constant under the Poisson loss.

    Knows the dataset and nothing of the sample. Computed in closed form from the table of panels, in float64.
    """

    def __init__(self, panels: Panels, n_genes: int) -> None:
        panel_of_row = np.repeat(np.arange(len(panels)), np.diff(panels.indptr))
        rate = panels.mean_normalized.astype(np.float64)
        self._n_genes = n_genes
        self._n_measured_N = np.diff(panels.indptr)
        self._log1p_rate = np.log1p(rate)
        self._zeros_part_N = np.bincount(panel_of_row, rate + 1 - self._log1p_rate, minlength=len(panels))
        self._keys = panel_of_row * n_genes + panels.gene_ids  # ascending: by panel, then by gene

    def totals(self, batches: Iterable["MaskedBatch"]) -> tuple[float, float, int]:
        """Sum loss and excess over the samples of `batches` (on the CPU), and count them."""
        loss = excess = 0.0
        n_samples = 0
        for batch in batches:
            panel_id_B = batch.panel_id.numpy()
            sample_of_nonzero = np.repeat(np.arange(len(panel_id_B)), np.diff(batch.target_indptr.numpy()))
            keys = panel_id_B[sample_of_nonzero] * self._n_genes + batch.target_gene_ids.numpy()
            counts = batch.target_counts.numpy().astype(np.float64)
            predicted = self._log1p_rate[np.searchsorted(self._keys, keys)]
            floor = (counts + 1) * (1 - np.log1p(counts)) - 1
            sums_2B = [
                np.bincount(sample_of_nonzero, values, minlength=len(panel_id_B))
                for values in (counts * predicted, floor)
            ]
            n_measured_B = np.maximum(self._n_measured_N[panel_id_B], 1)
            mean_B = (self._zeros_part_N[panel_id_B] - sums_2B[0]) / n_measured_B
            floor_B = (self._n_measured_N[panel_id_B] + sums_2B[1]) / n_measured_B
            loss += float(mean_B.sum())
            excess += float((mean_B - floor_B).sum())
            n_samples += len(panel_id_B)
        return loss, excess, n_samples


def means_over_processes(
    totals: tuple[float, float, int], accelerator: "Accelerator"
) -> tuple[float | None, float | None]:
    """Mean loss and excess over the samples of all processes; None where there are no samples."""
    summed = accelerator.reduce(torch.tensor(totals, dtype=torch.float64, device=accelerator.device), "sum")
    loss, excess, n_samples = summed.tolist()
    return (loss / n_samples, excess / n_samples) if n_samples else (None, None)
