"""TxFM written the straightforward way: the yardstick of the fast model, for its results and for its speed.

Standard blocks over all tokens, CLS taken at the end; rows of the codebook gathered, then projected; targets and losses over
(B, G). Nothing here is used to train or to embed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import NegativeBinomial

from txfm_model.config import ModelConfig
from txfm_model.losses import LEAST_MEAN, CountTarget, Loss, LossParts, Target
from txfm_model.model import TxFM
from txfm_model.prediction import Prediction

EPS = 1e-6
_RENAMED = (
    ("tokens.codebook", "codebook.weight"),
    ("tokens.projection", "projection"),
    ("encoder.blocks", "blocks"),
    ("encoder.", ""),
    ("attention.qkv.", "attention.in_proj_"),
    ("attention.out.", "attention.out_proj."),
    ("_scale.gamma", "_scale"),
    ("decoder.blocks", "decoder"),
    ("decoder.bridge", "bridge"),
    ("head.log_dispersion", "log_dispersion"),
    ("head.zero_inflation", "zero_inflation"),
)


def plain_name(name: str) -> str:
    """Name in `PlainTxFM` of the parameter `name` of `TxFM`."""
    for fast, plain in _RENAMED:
        name = name.replace(fast, plain, 1)
    return name


class PlainBlock(nn.Module):
    """Pre-norm transformer block over all tokens, as torch's own, with LayerScale."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.width
        self.attention_norm = nn.LayerNorm(D, eps=EPS)
        self.attention = nn.MultiheadAttention(D, config.heads, batch_first=True)
        self.attention_scale = nn.Parameter(torch.empty(D))
        self.mlp_norm = nn.LayerNorm(D, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(D, config.mlp_ratio * D), nn.GELU(), nn.Linear(config.mlp_ratio * D, D))
        self.mlp_scale = nn.Parameter(torch.empty(D))

    def forward(self, x_BTD: Tensor, padding_BT: Tensor | None, scale_2B: Tensor) -> Tensor:
        """State of all tokens after the block, (B, T, D)."""
        y_BTD = self.attention_norm(x_BTD)
        y_BTD, _ = self.attention(y_BTD, y_BTD, y_BTD, key_padding_mask=padding_BT, need_weights=False)
        x_BTD = x_BTD + y_BTD * self.attention_scale * scale_2B[0, :, None, None]
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)) * self.mlp_scale * scale_2B[1, :, None, None]


class PlainDecoderBlock(nn.Module):
    """Residual MLP block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x_BD: Tensor) -> Tensor:
        """State after the block, (B, D)."""
        out_BD: Tensor = x_BD + self.mlp(self.norm(x_BD))
        return out_BD


class PlainTxFM(nn.Module):
    """The straightforward TxFM; weights are not initialised, take them from a model with `of`."""

    def __init__(self, config: ModelConfig, n_genes: int) -> None:
        super().__init__()
        D, projects = config.width, config.tokens == "concat_project"
        self.config = config
        self.codebook = nn.Embedding(n_genes, D if projects else D - 1)
        self.projection = nn.Linear(D + 1, D) if projects else None
        self.cls = nn.Parameter(torch.empty(D))
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(D, eps=EPS)
        self.bridge = None if projects else nn.Linear(D, D)
        self.decoder = nn.ModuleList(PlainDecoderBlock(D) for _ in range(config.decoder_blocks))
        self.head = nn.Linear(D, n_genes)
        self.log_dispersion = nn.Parameter(torch.empty(n_genes)) if config.count_head != "none" else None
        self.zero_inflation = nn.Linear(D, n_genes) if config.count_head == "zinb" else None

    @classmethod
    def of(cls, model: TxFM) -> "PlainTxFM":
        """The plain form of a model, with a copy of its weights, on its device and in its mode."""
        plain = cls(model.config, len(model.vocabulary)).to(model.head.weight)
        plain.load_state_dict({plain_name(name): tensor for name, tensor in model.state_dict().items()})
        return plain.train(model.training)

    def forward(
        self,
        gene_ids_BK: Tensor,
        values_BK: Tensor,
        n_unmasked_B: Tensor | None = None,
        *,
        measured_BG: Tensor | None = None,
        branch_scale_RB: Tensor | None = None,
    ) -> Prediction:
        """Predict every gene; arguments as those of `TxFM`. Without `branch_scale_RB` nothing is dropped."""
        B, K = gene_ids_BK.shape
        x_BKD = torch.cat([self.codebook(gene_ids_BK), values_BK[..., None]], dim=-1)
        if self.projection is not None:
            x_BKD = self.projection(x_BKD)
        x_BTD = torch.cat([self.cls.expand(B, 1, -1), x_BKD], dim=1)
        padding_BT = None
        if n_unmasked_B is not None:
            padding_BT = torch.arange(K + 1, device=x_BTD.device) > n_unmasked_B[:, None]
        if branch_scale_RB is None:
            branch_scale_RB = torch.ones(2 * len(self.blocks), B, device=x_BTD.device)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, padding_BT, branch_scale_RB[2 * i : 2 * i + 2])
        cls_BD = self.norm(x_BTD)[:, 0]
        x_BD = cls_BD if self.bridge is None else self.bridge(cls_BD)
        for decoder_block in self.decoder:
            x_BD = decoder_block(x_BD)
        return Prediction(
            self._activated(self.head(x_BD), measured_BG),
            self.log_dispersion,
            None if self.zero_inflation is None else self.zero_inflation(cls_BD),
        )

    def _activated(self, logits_BG: Tensor, measured_BG: Tensor | None) -> Tensor:
        L = self.config.target_sum
        if self.config.activation == "rect_tanh":
            scale = 4 * math.e if self.config.tanh_scale is None else self.config.tanh_scale
            return math.log1p(L) * torch.tanh(logits_BG / scale).clamp_min(0)
        if self.config.activation == "softmax":
            if measured_BG is not None:
                logits_BG = logits_BG.masked_fill(~measured_BG, -torch.inf)
            return torch.log1p(L * logits_BG.softmax(-1))
        return logits_BG.clamp(0, math.log1p(L) if self.config.activation == "clamped_relu" else None)


def plain_loss(loss: Loss, prediction: Prediction, batch: Target, panels_NG: Tensor) -> LossParts:
    """Loss of each sample from targets and losses of every gene, (B, G); what `loss` computes sparsely.

    In the precision of the prediction. Genes outside the panel are computed as well and multiplied by 0.
    """
    log1p_BG = prediction.log1p_BG
    measured_BG = panels_NG[batch.panel_id].to(log1p_BG.dtype)
    normalized_BG = _dense(batch.target_counts, batch, log1p_BG)
    floor_BG = torch.zeros_like(log1p_BG)
    if loss.kind == "poisson":
        loss_BG = F.poisson_nll_loss(log1p_BG, normalized_BG + 1, reduction="none")
        floor_BG = (normalized_BG + 1) * (1 - normalized_BG.log1p())
    elif loss.kind == "mse":
        loss_BG = F.mse_loss(log1p_BG, normalized_BG.log1p(), reduction="none")
    elif loss.kind == "smooth_l1":
        loss_BG = F.smooth_l1_loss(log1p_BG, normalized_BG.log1p(), reduction="none")
    else:
        loss_BG, floor_BG = _plain_count_loss(loss, prediction, batch)
    n_measured_B = measured_BG.sum(1).clamp_min(1)
    sum_B, floor_sum_B = (loss_BG * measured_BG).sum(1), (floor_BG * measured_BG).sum(1)
    return LossParts(sum_B / n_measured_B, sum_B, floor_sum_B / n_measured_B, loss.reduction)


def _dense(values: Tensor, batch: Target, like_BG: Tensor) -> Tensor:
    """Values of the counts above 0 in (B, G), 0 elsewhere."""
    dense_BG = torch.zeros_like(like_BG)
    rows = torch.arange(len(like_BG), device=like_BG.device).repeat_interleave(batch.target_indptr.diff())
    dense_BG[rows, batch.target_gene_ids.long()] = values.to(like_BG.dtype)
    return dense_BG


def _plain_count_loss(loss: Loss, prediction: Prediction, batch: Target) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of counts and its floor, both (B, G)."""
    log1p_BG, log_dispersion_G, zero_logits_BG = prediction
    if not isinstance(batch, CountTarget) or batch.raw_counts is None or log_dispersion_G is None:
        raise ValueError(f"loss {loss.kind} needs raw counts and a dispersion of each gene")
    counts_BG = _dense(batch.raw_counts, batch, log1p_BG)
    mean_BG = log1p_BG.expm1() + LEAST_MEAN
    if loss.scale_library:
        mean_BG = mean_BG * (batch.library_size / loss.target_sum).to(log1p_BG.dtype)[:, None]
    mean_BG = mean_BG.clamp_min(LEAST_MEAN)

    def log_likelihood(mean_BG: Tensor, log_dispersion_G: Tensor) -> Tensor:
        logits_BG = mean_BG.log() - log_dispersion_G
        distribution = NegativeBinomial(log_dispersion_G.exp(), logits=logits_BG, validate_args=False)
        out_BG: Tensor = distribution.log_prob(counts_BG)
        return out_BG

    loss_BG = -log_likelihood(mean_BG, log_dispersion_G)
    at_counts_BG = log_likelihood(torch.where(counts_BG > 0, counts_BG, 1.0), log_dispersion_G.detach())
    floor_BG = torch.where(counts_BG > 0, -at_counts_BG, 0.0)
    if zero_logits_BG is not None:
        log_inflated_BG, log_other_BG = F.logsigmoid(zero_logits_BG), F.logsigmoid(-zero_logits_BG)
        of_zero_BG = torch.logaddexp(log_inflated_BG, log_other_BG - loss_BG)
        loss_BG = -torch.where(counts_BG > 0, log_other_BG - loss_BG, of_zero_BG)
    return loss_BG, floor_BG
