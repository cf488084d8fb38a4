"""From logits of the gene head to predicted log1p values."""

import math

import torch
from torch import Tensor

LOGIT_SCALE = 4 * math.e
"""Logits are divided by this before tanh; near ln(1 + L) for L = 1e5, so that the slope at 0 is near 1."""


def rectified_tanh(logits_BG: Tensor, target_sum: float) -> Tensor:
    """Predicted log1p value ln(1 + L) max(0, tanh(z / 4e)): from 0 to ln(1 + L), without slope for z <= 0."""
    return math.log1p(target_sum) * torch.relu(torch.tanh(logits_BG / LOGIT_SCALE))


def rectified_tanh_inverse(log1p_G: Tensor, target_sum: float) -> Tensor:
    """Logit whose prediction is the given log1p value, 4e atanh(x / ln(1 + L)); finite below ln(1 + L)."""
    return LOGIT_SCALE * torch.atanh(log1p_G / math.log1p(target_sum))
