"""The start of every parameter, in one function."""

import torch
from torch import Tensor, nn

from txfm_data.vocabulary import GeneStatistics
from txfm_model.activations import rectified_tanh_inverse
from txfm_model.decoder import GeneHead
from txfm_model.encoder import Encoder, LayerScale
from txfm_model.tokens import GeneTokens

STD = 0.02
LOWEST_LOGIT = 0.3
"""The rectified tanh has no gradient at or below 0: with `corpus_mean`, every gene starts above it."""
HEAD_WEIGHT_SCALE = 0.25
"""With `corpus_mean`, head weights start smaller so that the bias decides the first predictions."""


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int = 0, statistics: GeneStatistics | None = None) -> None:
    """Set every parameter of a model in place, from `seed` and no other random state.

    Linear layers and CLS: normal of std 0.02, cut at two of them; zero biases. Codebook: normal of std `codebook_std`.
    Norms: identity. Gene head: zero bias, or with `head_init="corpus_mean"` the logit at which a gene's
    prediction is its corpus mean in `statistics` (without them, the lowest start for every gene). On
    the meta device nothing is done.
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
            if module.start == "corpus_mean":
                module.weight.mul_(HEAD_WEIGHT_SCALE)
                module.bias.copy_(_corpus_mean_logits(module, statistics))


def _corpus_mean_logits(head: GeneHead, statistics: GeneStatistics | None) -> Tensor:
    if statistics is None:
        return torch.full_like(head.bias, LOWEST_LOGIT)
    if len(statistics.mean_log1p) != len(head.bias):
        raise ValueError(
            f"gene statistics cover {len(statistics.mean_log1p)} genes, the gene head {len(head.bias)}; "
            f"take both from the same vocabulary"
        )
    logits_G = rectified_tanh_inverse(torch.from_numpy(statistics.mean_log1p).double(), head.target_sum)
    if not torch.isfinite(logits_G).all():
        raise ValueError(f"mean log1p of a gene is not in [0, ln(1 + {head.target_sum:g})); build the shards again")
    return logits_G.clamp_min(LOWEST_LOGIT).to(head.bias)
