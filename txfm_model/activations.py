"""From logits of the gene head to predicted log1p values, and back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from txfm_model.config import ModelConfig

LOGIT_SCALE = 4 * math.e
"""Logits are divided by this before tanh; near ln(1 + L) for L = 1e5, so that the slope at 0 is near 1."""
LEAST_COUNT = 0.01
"""Normalised count below which `Activation.inverse` of softmax does not go: the logit of 0 would be -infinity."""


def rectified_tanh(logits_BG: Tensor, target_sum: float, scale: float = LOGIT_SCALE) -> Tensor:
    """Predicted log1p value ln(1 + L) max(0, tanh(z / scale)): from 0 to ln(1 + L), without slope for z <= 0."""
    return math.log1p(target_sum) * torch.relu(torch.tanh(logits_BG / scale))


def rectified_tanh_inverse(log1p_G: Tensor, target_sum: float, scale: float = LOGIT_SCALE) -> Tensor:
    """Logit whose prediction is the given log1p value, scale atanh(x / ln(1 + L)); finite below ln(1 + L)."""
    return scale * torch.atanh(log1p_G / math.log1p(target_sum))


def clamped_relu(logits_BG: Tensor, target_sum: float) -> Tensor:
    """Predicted log1p value min(max(0, z), ln(1 + L)), without slope for z <= 0 or above ln(1 + L)."""
    return torch.relu(logits_BG).clamp_max(math.log1p(target_sum))


def softmax_of_measured(logits_BG: Tensor, target_sum: float, measured_BG: Tensor | None = None) -> Tensor:
    """Predicted log1p value ln(1 + L softmax(z)): the measured genes of a sample share L counts.

    Genes that are not measured get the value 0, take no share and pass no gradient, whatever their logit. Without
    `measured_BG`, (B, G) bool, all genes share.
    """
    if measured_BG is not None:
        # A row without a measured gene would be 0 / 0: give it equal shares, and blank those as well.
        lowest_B1 = torch.where(measured_BG.any(-1, keepdim=True), -torch.inf, 0.0)
        logits_BG = torch.where(measured_BG, logits_BG, lowest_B1)
    log1p_BG = torch.log1p(target_sum * torch.softmax(logits_BG, dim=-1))
    return log1p_BG if measured_BG is None else log1p_BG.masked_fill(~measured_BG, 0.0)


@dataclass(frozen=True)
class Activation:
    """The activation that a configuration names; call it on logits.

    name : as `ModelConfig.activation`.
    target_sum : L, counts.
    scale : what rect_tanh divides logits by.
    """

    name: str
    target_sum: float
    scale: float = LOGIT_SCALE

    @classmethod
    def of(cls, config: ModelConfig) -> "Activation":
        """The activation of a model."""
        return cls(
            config.activation, config.target_sum, LOGIT_SCALE if config.tanh_scale is None else config.tanh_scale
        )

    @property
    def is_rectified(self) -> bool:
        """Whether logits at or below 0 have no gradient."""
        return self.name != "softmax"

    def __call__(self, logits_BG: Tensor, measured_BG: Tensor | None = None) -> Tensor:
        """Predicted log1p values, (B, G); `measured_BG` is read by softmax alone."""
        match self.name:
            case "rect_tanh":
                return rectified_tanh(logits_BG, self.target_sum, self.scale)
            case "relu":
                return torch.relu(logits_BG)
            case "clamped_relu":
                return clamped_relu(logits_BG, self.target_sum)
            case "softmax":
                return softmax_of_measured(logits_BG, self.target_sum, measured_BG)
        raise ValueError(f"activation {self.name!r} is none of rect_tanh, relu, clamped_relu, softmax")

    def inverse(self, log1p_G: Tensor) -> Tensor:
        """Logits, (G,), whose predictions are the given log1p values in [0, ln(1 + L)).

        Of softmax, the logarithms of the counts, at least of `LEAST_COUNT`: where these do not add up to L, all
        predicted counts are larger or smaller by one factor.
        """
        if self.name == "rect_tanh":
            return rectified_tanh_inverse(log1p_G, self.target_sum, self.scale)
        if self.name == "softmax":
            return log1p_G.expm1().clamp_min(LEAST_COUNT).log()
        return log1p_G
