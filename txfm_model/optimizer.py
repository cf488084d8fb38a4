"""AdamW with decay on matrices only, and the one-cycle cosine schedule as a function of the step."""

import math

import torch
from torch import nn

from txfm_model.config import OptimConfig

FUSED_DEVICES = ("cpu", "cuda")


def weight_decay(config: OptimConfig, total_steps: int) -> float:
    """Weight decay of the run; by default AdamW averages over the length of the run, lr x wd x steps = 1."""
    return 1 / (config.lr * total_steps) if config.weight_decay is None else config.weight_decay


def make_optimizer(model: nn.Module, config: OptimConfig, total_steps: int) -> torch.optim.AdamW:
    """AdamW over a model: matrices and codebook decay; biases, norms, LayerScale and CLS (vectors) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay(config, total_steps)},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in FUSED_DEVICES for p in parameters)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True if fused else None,
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of a step (0 is the first), as torch's OneCycleLR with cosine annealing gives it.

    A function of the step rather than a scheduler object: nothing to save, nothing that a launcher could step
    once for each process, and defined where OneCycleLR divides by zero (a warm-up of one step).
    """
    first = config.lr / config.div_factor
    last = first / config.final_div_factor
    peak_step = max(config.warmup_fraction * total_steps - 1, 0.0)
    if step < peak_step:
        return _cosine(first, config.lr, step / peak_step)
    return _cosine(config.lr, last, (step - peak_step) / max(total_steps - 1 - peak_step, 1.0))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
