"""The rows of `txfm bench train`: one model, its optimizer and how it is run, taking training steps."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shards.manifest import Corpus
from shards.stream import MaskedBatch, MaskedStream
from txfm_model.bench.variants import VARIANTS, Variant
from txfm_model.config import ModelConfig, OptimConfig
from txfm_model.initialise import initialise
from txfm_model.launch import autocast
from txfm_model.model import TxFM
from txfm_model.optimizer import make_optimizer
from txfm_model.run import panel_table
from txfm_model.stochastic_depth import BranchScales, branch_scales, stochastic_depth_rates

Precision = Literal["bf16", "no"]
_SCHEDULED_STEPS = 1_000_000  # weight decay is made from it, nothing else


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row runs. variant : one of `VARIANTS`.  precision : as `txfm_model.launch.Precision`."""

    variant: str
    precision: Precision = "no"
    is_compiled: bool = False

    @property
    def name(self) -> str:
        """Its name in JSON."""
        kind = "bf16" if self.precision == "bf16" else "float32"
        return f"{self.variant}_{kind}" + ("_compiled" if self.is_compiled else "")

    @property
    def label(self) -> str:
        """Its name in the table."""
        kind = "bf16" if self.precision == "bf16" else "float32"
        return f"{VARIANTS[self.variant].label}, {kind}" + (", compiled" if self.is_compiled else "")


ROWS = {
    row.name: row
    for variant in VARIANTS
    for precision in ("no", "bf16")
    for is_compiled in (False, True)
    for row in [Row(variant=variant, precision=precision, is_compiled=is_compiled)]
}


class Feed:
    """Masked batches of a corpus without end, epoch after epoch, and the table of its panels on the device."""

    def __init__(self, corpus: Corpus, *, batch: int, n_unmasked: int, seed: int, device: torch.device) -> None:
        self.corpus, self.device = corpus, device
        self._stream = MaskedStream(
            corpus, seed=seed, global_batch=batch, n_unmasked=n_unmasked, pin_memory=device.type == "cuda"
        )
        self.panels_NG = panel_table(corpus.panels, len(corpus.vocabulary)).to(device)
        self._batches = self._endless()

    def next(self) -> MaskedBatch:
        """The next batch, on the CPU."""
        return next(self._batches)

    @property
    def wait_s(self) -> float:
        """Seconds that `next` has waited so far."""
        return self._stream.wait_s

    def close(self) -> None:
        """End its thread."""
        self._batches.close()

    def _endless(self) -> Generator[MaskedBatch, None, None]:
        epoch = 0
        while True:
            yield from self._stream.epoch(epoch)
            epoch += 1


class Trainee:
    """A model that takes training steps: forward, loss, backward, AdamW, gradients set to None.

    row : what is run.  config : the network.  feed : vocabulary, panels and device.  seed : of weights and stochastic depth.
    """

    def __init__(self, row: Row, config: ModelConfig, feed: Feed, *, seed: int) -> None:
        self._row, self._feed, self._seed = row, feed, seed
        model = TxFM(config, feed.corpus.vocabulary)
        initialise(model, seed=seed, statistics=feed.corpus.statistics)
        variant: Variant = VARIANTS[row.variant]
        self._rates = stochastic_depth_rates(config.blocks, config.stochastic_depth)
        self.module, self._loss = variant.build(model)
        self.module.to(feed.device).train()
        self._masks_all, self._computes_all = variant.masks_all, variant.computes_all or row.is_compiled
        optimizer = make_optimizer(self.module, OptimConfig(), _SCHEDULED_STEPS)
        self._optimizer = optimizer if variant.is_fused else _unfused(optimizer)
        self._forward: Callable[..., object] = self.module
        if row.is_compiled:
            self._forward = torch.compile(self.module, dynamic=False)

    def step(self, batch: MaskedBatch) -> Tensor:
        """Take one step; the loss, still on the device."""
        loss = self.backward(batch)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def backward(self, batch: MaskedBatch, *, drops: bool = True) -> Tensor:
        """Forward, loss, backward; gradients are left. Without `drops` every sample has every branch."""
        device = self._feed.device
        scales_RB: BranchScales = branch_scales(self._rates, self._seed, batch.epoch, batch.sample_id.numpy())
        if not drops:
            scales_RB = np.ones_like(scales_RB)
        if self._computes_all:
            scales_RB = torch.from_numpy(scales_RB).to(device)
        batch = batch.to(device)
        with autocast(device, self._row.precision):
            prediction = self._forward(
                batch.gene_ids,
                batch.values,
                batch.n_unmasked if batch.is_padded or self._masks_all else None,
                branch_scale_RB=scales_RB,
            )
        loss: Tensor = self._loss(prediction, batch, self._feed.panels_NG)
        loss.backward()
        return loss.detach()


def _unfused(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """The same, as torch chooses its implementation where nothing is said."""
    kept = ("params", "weight_decay", "lr", "betas", "eps")
    return torch.optim.AdamW([{key: group[key] for key in kept} for group in optimizer.param_groups])
