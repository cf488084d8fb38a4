"""From the CLS state to a predicted log1p value of every gene: residual MLP, gene head, activation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txfm_model.activations import rectified_tanh
from txfm_model.config import ModelConfig
from txfm_model.encoder import LAYER_NORM_EPS


class ResidualMLP(nn.Module):
    """One decoder block: x + W2 gelu(W1 norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x_BD: Tensor) -> Tensor:
        """State after the block."""
        branch_BD: Tensor = self.mlp(self.norm(x_BD))
        return x_BD + branch_BD


class Decoder(nn.Module):
    """Residual MLP blocks; with `tokens="concat"` after one linear layer from encoder to decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.bridge = nn.Linear(config.width, config.width) if config.tokens == "concat" else None
        self.blocks = nn.ModuleList(ResidualMLP(config.width) for _ in range(config.decoder_blocks))

    def forward(self, cls_BD: Tensor) -> Tensor:
        """State that the gene head reads, (B, D)."""
        x_BD = cls_BD if self.bridge is None else self.bridge(cls_BD)
        for block in self.blocks:
            x_BD = block(x_BD)
        return x_BD


class GeneHead(nn.Module):
    """Linear layer with a row for each gene, then the rectified tanh."""

    def __init__(self, n_genes: int, config: ModelConfig) -> None:
        super().__init__()
        self.start = config.head_init
        self.target_sum = config.target_sum
        self.weight = nn.Parameter(torch.empty(n_genes, config.width))
        self.bias = nn.Parameter(torch.empty(n_genes))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Predicted log1p value of every gene, (B, G)."""
        return rectified_tanh(F.linear(x_BD, self.weight, self.bias), self.target_sum)
