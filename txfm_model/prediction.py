"""What the model predicts of a sample, and what a loss reads of it."""

from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """What the gene head makes of the state of B samples.

    log1p_BG : (B, G) float32. Predicted ln(1 + normalised count) of every gene.
    log_dispersion_G : (G,) float32, or None. Of models of counts (nb, zinb): ln θ, where a count of mean μ has the
    variance μ + μ² / θ.
    zero_logits_BG : (B, G) float32, or None. Of zinb: logit of the chance that a count is 0 whatever its mean.
    """

    log1p_BG: Tensor
    log_dispersion_G: Tensor | None = None
    zero_logits_BG: Tensor | None = None
