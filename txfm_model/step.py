"""One optimizer step: this process's share of a global batch, in one part or several.

The gradient of a step is the mean over its samples, whatever number of processes and parts they are dealt to; masks and
stochastic depth are functions of (seed, epoch, sample id). So the layout changes nothing but rounding.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from txfm_model.launch import autocast
from txfm_model.losses import measured_mask
from txfm_model.optimizer import set_learning_rate
from txfm_model.stochastic_depth import BranchScales, branch_scales, stochastic_depth_rates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shards.stream import MaskedBatch
    from txfm_model.run import Run
    from txfm_model.window import TrainWindow


def train_step(run: "Run", batch: "MaskedBatch", lr: float, window: "TrainWindow") -> None:
    """Run one optimizer step and record it.

    Parameters
    ----------
    run
        Model, optimizer and the rest of the run.
    batch
        This process's part of the global batch, on the CPU.
    lr
        Learning rate of the step.
    window
        Takes losses, live genes and the norm of the gradient (before clipping).
    """
    set_learning_rate(run.optimizer, lr)
    parts = list(_parts(run, batch))
    for i, (part, scales_RB) in enumerate(parts):
        with _without_reduction(run, is_last=i == len(parts) - 1):
            part = part.to(run.accelerator.device)
            measured_BG = measured_mask(part.panel_id, run.panels_NG)
            with autocast(run.accelerator.device, run.precision):
                prediction = run.wrapped(
                    part.gene_ids,
                    part.values,
                    part.n_unmasked if part.is_padded else None,
                    measured_BG=measured_BG if run.config.model.activation == "softmax" else None,
                    branch_scale_RB=scales_RB,
                )
            loss = run.loss(prediction, part, run.panels_NG)
            run.accelerator.backward(loss.loss / len(parts))
            window.add(part.sample_id, measured_BG, prediction.log1p_BG, loss)
    window.end_step(_clip(run))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def _parts(run: "Run", batch: "MaskedBatch") -> "Iterator[tuple[MaskedBatch, BranchScales | None]]":
    """Parts of a batch, with the stochastic depth of each branch and sample.

    As an array, so that branches which samples are without are not computed; a compiled model wants the same shapes in
    every step, and gets a tensor.
    """
    model, loop = run.config.model, run.config.loop
    rates = stochastic_depth_rates(model.blocks, model.stochastic_depth)
    for part in batch.split(loop.accumulation):
        if model.stochastic_depth == 0:
            yield part, None
            continue
        scales_RB = branch_scales(rates, loop.seed, part.epoch, part.sample_id.numpy())
        yield part, torch.from_numpy(scales_RB).to(run.accelerator.device) if loop.compile else scales_RB


def _without_reduction(run: "Run", *, is_last: bool) -> AbstractContextManager[object]:
    """Gradients are averaged over processes once a step, with the last part."""
    context: AbstractContextManager[object] = nullcontext() if is_last else run.accelerator.no_sync(run.wrapped)
    return context


def _clip(run: "Run") -> Tensor:
    """Norm of the gradient over all parameters, which is scaled down to `optim.clip_norm` if it is larger."""
    parameters = [parameter for parameter in run.wrapped.parameters() if parameter.grad is not None]
    if run.is_sharded:
        from txfm_model.fsdp import gradient_norm  # DTensors take their time to import

        norm = gradient_norm(parameters)
    else:
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if run.config.optim.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, run.config.optim.clip_norm, norm)
    return norm
