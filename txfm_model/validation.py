"""Loss on held-out samples, for the model and for the panel-mean predictor that it has to beat."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

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

    from shards.stream import MaskedBatch
    from txfm_model.run import Run


def validate(run: "Run", step: int) -> dict[str, float | None]:
    """Mean loss and excess of the model over the val split; None without one.

    Raises
    ------
    NonFiniteError
        If it is not finite.
    """
    model = run.model
    if run.is_sharded:
        from txfm_model.fsdp import whole_model

        model = whole_model(model)
    totals = model_totals(model, run.validation_batches(), run.loss, run.panels_NG, run.precision)
    loss, excess = means_over_processes(totals, run.accelerator)
    if loss is not None and not math.isfinite(loss):
        raise NonFiniteError(f"step {step}: the validation loss is {loss}; training stopped. Lower optim.lr")
    return {"loss": loss, "excess": excess}


@torch.no_grad()
def model_totals(
    model: TxFM, batches: "Iterable[MaskedBatch]", loss: Loss, panels_NG: Tensor, precision: Precision
) -> tuple[float, float, int]:
    """Sum loss and excess over the samples of `batches`, and count them; the model is in evaluation mode."""
    device = panels_NG.device
    was_training = model.training
    model.eval()
    totals_2 = torch.zeros(2, dtype=torch.float64, device=device)
    n_samples = 0
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
        totals_2 += torch.stack([parts.loss_B.double().sum(), parts.excess_B.double().sum()])
        n_samples += len(batch.panel_id)
    model.train(was_training)
    total, excess = totals_2.tolist()
    return total, excess, n_samples


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
    return {"panel_mean_loss": loss, "panel_mean_excess": excess}


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
