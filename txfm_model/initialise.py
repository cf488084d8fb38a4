"""The start of every parameter, in one function."""

import math

import torch
from torch import Tensor, nn

from txfm_data.vocabulary import GeneStatistics
from txfm_model.decoder import GeneHead
from txfm_model.encoder import Encoder, LayerScale
from txfm_model.tokens import GeneTokens

STD = 0.02
LOWEST_LOGIT = 0.3
"""Rectified activations have no gradient at or below 0: with `corpus_mean`, every gene starts above it."""
HEAD_WEIGHT_SCALE = 0.25
"""With `corpus_mean`, head weights start smaller so that the bias decides the first predictions."""
ZERO_INFLATION_BIAS = -3.0
"""With `corpus_mean`, an extra 0 starts with a chance of 5 %, so that the mean of counts stays near that of the corpus."""


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int = 0, statistics: GeneStatistics | None = None) -> None:
    """Set every parameter of a model in place, from `seed` and no other random state.

    Linear layers and CLS: normal of std 0.02, cut at two of them; zero biases. Codebook: normal of std `codebook_std`.
    Norms: identity. Dispersions: θ = 1. Gene head: zero bias, or with `head_init="corpus_mean"` the logit at which a
    gene's prediction is its corpus mean in `statistics`. Without them, or where `preprocessing` is log1p, of whose values
    there are no statistics, every gene gets the lowest start; under softmax, equal shares. On the meta device nothing is
    done.

    Raises
    ------
    ValueError
        If the statistics are of another vocabulary, or of values that cannot be.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=STD, a=-2 * STD, b=2 * STD, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.start)
        elif isinstance(module, GeneTokens):
            nn.init.normal_(module.codebook, std=module.codebook_std, generator=generator)
        elif isinstance(module, Encoder):
            nn.init.trunc_normal_(module.cls, std=STD, a=-2 * STD, b=2 * STD, generator=generator)
        elif isinstance(module, GeneHead):
            nn.init.trunc_normal_(module.weight, std=STD, a=-2 * STD, b=2 * STD, generator=generator)
            nn.init.zeros_(module.bias)
            if module.log_dispersion is not None:
                nn.init.zeros_(module.log_dispersion)
    for module in model.modules():  # after its linear layers have their own start
        if isinstance(module, GeneHead) and module.config.head_init == "corpus_mean":
            module.weight.mul_(HEAD_WEIGHT_SCALE)
            module.bias.copy_(_corpus_mean_logits(module, statistics))
            if module.zero_inflation is not None:
                nn.init.constant_(module.zero_inflation.bias, ZERO_INFLATION_BIAS)


def _corpus_mean_logits(head: GeneHead, statistics: GeneStatistics | None) -> Tensor:
    activation, target_sum = head.activation, head.config.target_sum
    if statistics is None or head.config.preprocessing == "log1p":
        return torch.full_like(head.bias, LOWEST_LOGIT if activation.is_rectified else 0.0)
    if len(statistics.mean_log1p) != len(head.bias):
        raise ValueError(
            f"gene statistics cover {len(statistics.mean_log1p)} genes, the gene head {len(head.bias)}; "
            f"take both from the same vocabulary"
        )
    log1p_G = torch.from_numpy(statistics.mean_log1p).double()
    if not ((log1p_G >= 0) & (log1p_G < math.log1p(target_sum))).all():
        raise ValueError(f"mean log1p of a gene is not in [0, ln(1 + {target_sum:g})); build the shards again")
    logits_G = activation.inverse(log1p_G)
    return (logits_G.clamp_min(LOWEST_LOGIT) if activation.is_rectified else logits_G).to(head.bias)
