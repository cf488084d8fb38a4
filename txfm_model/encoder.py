"""The pre-norm ViT encoder: CLS and gene tokens in, the CLS state out. No positions: genes are a set."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txfm_model.config import ModelConfig

LAYER_NORM_EPS = 1e-6


def stochastic_depth_rates(blocks: int, last: float) -> list[float]:
    """Drop rate of each block, rising linearly from 0 at the first to `last` at the last."""
    return [last * block / max(blocks - 1, 1) for block in range(blocks)]


def drop_branch(branch_BTD: Tensor, rate: float) -> Tensor:
    """Zero a branch for a random share `rate` of the samples and scale the others by 1 / (1 - rate)."""
    keep_B11 = torch.rand(len(branch_BTD), 1, 1, device=branch_BTD.device) >= rate
    return branch_BTD * (keep_B11 / (1 - rate))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, answering for the first `n_queries` of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, visible_B11T: Tensor | None, n_queries: int) -> Tensor:
        """Attend from the first `n_queries` tokens to the visible ones (None: all), (B, n_queries, D)."""
        D = x_BTD.shape[-1]
        if n_queries == x_BTD.shape[1]:
            q_BQD, k_BTD, v_BTD = self.qkv(x_BTD).chunk(3, dim=-1)
        else:
            q_BQD = F.linear(x_BTD[:, :n_queries], self.qkv.weight[:D], self.qkv.bias[:D])
            k_BTD, v_BTD = F.linear(x_BTD, self.qkv.weight[D:], self.qkv.bias[D:]).chunk(2, dim=-1)
        q_BHQC, k_BHTC, v_BHTC = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q_BQD, k_BTD, v_BTD))
        out_BHQC = F.scaled_dot_product_attention(q_BHQC, k_BHTC, v_BHTC, attn_mask=visible_B11T)
        out_BQD: Tensor = self.out(out_BHQC.transpose(1, 2).flatten(-2))
        return out_BQD


class LayerScale(nn.Module):
    """Per-channel weight of a residual branch."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Scale each channel."""
        return x_BTD * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and per-sample stochastic depth on both branches."""

    def __init__(self, config: ModelConfig, drop_rate: float) -> None:
        super().__init__()
        D = config.width
        self.drop_rate = drop_rate
        self.attention_norm = nn.LayerNorm(D, eps=LAYER_NORM_EPS)
        self.attention = Attention(D, config.heads)
        self.attention_scale = LayerScale(D, config.layerscale_init)
        self.mlp_norm = nn.LayerNorm(D, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(D, config.mlp_ratio * D), nn.GELU(), nn.Linear(config.mlp_ratio * D, D))
        self.mlp_scale = LayerScale(D, config.layerscale_init)

    def forward(self, x_BTD: Tensor, visible_B11T: Tensor | None, n_queries: int) -> Tensor:
        """State of the first `n_queries` tokens after the block, (B, n_queries, D)."""
        attended_BQD = self.attention(self.attention_norm(x_BTD), visible_B11T, n_queries)
        x_BQD = x_BTD[:, :n_queries] + self._maybe_drop(self.attention_scale(attended_BQD))
        return x_BQD + self._maybe_drop(self.mlp_scale(self.mlp(self.mlp_norm(x_BQD))))

    def _maybe_drop(self, branch_BQD: Tensor) -> Tensor:
        return drop_branch(branch_BQD, self.drop_rate) if self.training and self.drop_rate > 0 else branch_BQD


class Encoder(nn.Module):
    """CLS token, blocks, final norm. The last block is computed for CLS alone: nothing else is read of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.empty(config.width))
        rates = stochastic_depth_rates(config.blocks, config.stochastic_depth)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, tokens_BKD: Tensor, n_unmasked_B: Tensor | None) -> Tensor:
        """CLS after the final norm, (B, D) float32. Tokens from `n_unmasked_B` on are padding."""
        B, K, _ = tokens_BKD.shape
        x_BTD = torch.cat([self.cls.expand(B, 1, -1), tokens_BKD], dim=1)
        visible_B11T = None
        if n_unmasked_B is not None:
            token_T = torch.arange(K + 1, device=tokens_BKD.device)
            visible_B11T = (token_T <= n_unmasked_B[:, None])[:, None, None, :]  # token 0 is CLS, always visible
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, visible_B11T, 1 if i == last else K + 1)
        cls_BD: Tensor = self.norm(x_BTD[:, 0])
        return cls_BD.float()
