"""The pre-norm ViT encoder: CLS and gene tokens in, the CLS state out. No positions: genes are a set."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from txfm_model.config import ModelConfig
from txfm_model.stochastic_depth import WHOLE, BranchScales, BranchShare, branch_shares, stochastic_depth_rates

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, answering for the first `n_queries` of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, visible_B11T: Tensor | None, n_queries: int, scale: "LayerScale") -> Tensor:
        """Attend from the first `n_queries` tokens to the visible ones (None: all), scaled, (B, n_queries, D)."""
        D = x_BTD.shape[-1]
        if n_queries == x_BTD.shape[1]:
            q_BQD, k_BTD, v_BTD = self.qkv(x_BTD).chunk(3, dim=-1)
        else:
            q_BQD = F.linear(x_BTD[:, :n_queries], self.qkv.weight[:D], self.qkv.bias[:D])
            k_BTD, v_BTD = F.linear(x_BTD, self.qkv.weight[D:], self.qkv.bias[D:]).chunk(2, dim=-1)
        q_BHQC, k_BHTC, v_BHTC = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q_BQD, k_BTD, v_BTD))
        out_BHQC = _attend(q_BHQC, k_BHTC, v_BHTC, visible_B11T)
        out_BQD: Tensor = scale(self.out, out_BHQC.transpose(1, 2).flatten(-2))
        return out_BQD


def _attend(q_BHQC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, visible_B11T: Tensor | None) -> Tensor:
    if q_BHQC.device.type != "cpu" or q_BHQC.dtype == torch.float32:
        return F.scaled_dot_product_attention(q_BHQC, k_BHTC, v_BHTC, attn_mask=visible_B11T)
    # On a CPU torch's attention takes a third longer in bf16 than in float32, although matrix products take half as long.
    with torch.autocast("cpu", enabled=False):
        out_BHQC = F.scaled_dot_product_attention(
            q_BHQC.float(), k_BHTC.float(), v_BHTC.float(), attn_mask=visible_B11T
        )
    return out_BHQC


class LayerScale(nn.Module):
    """Per-channel weight of a residual branch."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, linear: nn.Linear, x_BTD: Tensor) -> Tensor:
        """Output of the last linear layer of a branch with each channel scaled, (B, T, D).

        The layer's weights are scaled in place of its output: the same product, of which the backward pass needs no copy.
        """
        return F.linear(x_BTD, linear.weight * self.gamma[:, None], linear.bias * self.gamma)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale on both branches, each of which a sample may be without."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.width
        self.attention_norm = nn.LayerNorm(D, eps=LAYER_NORM_EPS)
        self.attention = Attention(D, config.heads)
        self.attention_scale = LayerScale(D, config.layerscale_init)
        self.mlp_norm = nn.LayerNorm(D, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(D, config.mlp_ratio * D), nn.GELU(), nn.Linear(config.mlp_ratio * D, D))
        self.mlp_scale = LayerScale(D, config.layerscale_init)

    def forward(
        self,
        x_BTD: Tensor,
        visible_B11T: Tensor | None,
        n_queries: int,
        attention_share: BranchShare = WHOLE,
        mlp_share: BranchShare = WHOLE,
    ) -> Tensor:
        """State of the first `n_queries` tokens after the block, (B, n_queries, D).

        The shares say which samples have each branch, and what it is multiplied by.
        """
        kept = attention_share.kept
        if kept is not None and visible_B11T is not None:
            visible_B11T = visible_B11T[kept]
        attended_BQD = self.attention(
            self.attention_norm(attention_share.choose(x_BTD)), visible_B11T, n_queries, self.attention_scale
        )
        x_BQD = attention_share.add(x_BTD[:, :n_queries], attended_BQD)
        widen, gelu, narrow = self.mlp
        hidden_BQF = gelu(widen(self.mlp_norm(mlp_share.choose(x_BQD))))
        return mlp_share.add(x_BQD, self.mlp_scale(narrow, hidden_BQF))


class Encoder(nn.Module):
    """CLS token, blocks, final norm. The last block is computed for CLS alone: nothing else is read of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.empty(config.width))
        self.rates = stochastic_depth_rates(config.blocks, config.stochastic_depth)
        self.blocks = nn.ModuleList(Block(config) for _ in self.rates)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.checkpoints_activations = False

    def forward(
        self, tokens_BKD: Tensor, n_unmasked_B: Tensor | None, branch_scale_RB: BranchScales | None = None
    ) -> Tensor:
        """CLS after the final norm, (B, D) float32. Tokens from `n_unmasked_B` on are padding."""
        cls_BD: Tensor = self.norm(self.cls_after(len(self.blocks), tokens_BKD, n_unmasked_B, branch_scale_RB))
        return cls_BD.float()

    def cls_after(
        self,
        n_blocks: int,
        tokens_BKD: Tensor,
        n_unmasked_B: Tensor | None,
        branch_scale_RB: BranchScales | None = None,
    ) -> Tensor:
        """CLS as it is after the first `n_blocks` blocks, (B, D), without the final norm."""
        B, K, _ = tokens_BKD.shape
        if branch_scale_RB is None and self.training:
            branch_scale_RB = self._drawn_branch_scales(B)
        x_BTD = torch.cat([self.cls.expand(B, 1, -1), tokens_BKD], dim=1)
        visible_B11T = None
        if n_unmasked_B is not None:
            token_T = torch.arange(K + 1, device=tokens_BKD.device)
            visible_B11T = (token_T <= n_unmasked_B[:, None])[:, None, None, :]  # token 0 is CLS, always visible
        shares = branch_shares(branch_scale_RB, self.rates, x_BTD.device)
        for i, block in enumerate(self.blocks[:n_blocks]):
            arguments = (x_BTD, visible_B11T, 1 if i == n_blocks - 1 else K + 1, *shares[2 * i : 2 * i + 2])
            if self.checkpoints_activations and torch.is_grad_enabled():
                # A block draws nothing at random, so that there is no state of a generator to go back to.
                x_BTD = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = block(*arguments)
        return x_BTD[:, 0]

    def _drawn_branch_scales(self, n_samples: int) -> Tensor | None:
        """Scales from torch's generator, (2 x blocks, B) float32, for callers that do not say which; None if all are 1."""
        if not any(self.rates):
            return None
        scale_RB = torch.ones(2 * len(self.rates), n_samples, device=self.cls.device)
        for row, rate in enumerate(rate for rate in self.rates for _ in range(2)):
            if rate > 0:
                scale_RB[row] = (torch.rand(n_samples, device=self.cls.device) >= rate) / (1 - rate)
        return scale_RB
