"""Tokens [E_g ; x_g] of the unmasked genes: the encoder's table of gene embeddings and each gene's value."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txfm_model.config import ModelConfig


class GeneTokens(nn.Module):
    """Codebook and, with `tokens="concat_project"`, the projection of [E_g ; x_g] to the encoder's width.

    In float32 also under autocast: a small share of the work, and a row's gradient sums over many tokens.
    """

    def __init__(self, n_genes: int, config: ModelConfig) -> None:
        super().__init__()
        projects = config.tokens == "concat_project"
        self.codebook_std = config.codebook_std
        self.codebook = nn.Parameter(torch.empty(n_genes, config.width if projects else config.width - 1))
        self.projection = nn.Linear(config.width + 1, config.width) if projects else None

    def forward(self, gene_ids_BK: Tensor, values_BK: Tensor) -> Tensor:
        """Tokens of the genes `gene_ids_BK` (int64) with log1p values `values_BK`, (B, K, D) float32."""
        with torch.autocast(gene_ids_BK.device.type, enabled=False):
            if self.projection is None:
                rows_BKE = F.embedding(gene_ids_BK, self.codebook)
                return torch.cat([rows_BKE, values_BK.float()[..., None]], dim=-1)
            gene_weight_DD, value_weight_D = self.projection.weight[:, :-1], self.projection.weight[:, -1]
            if gene_ids_BK.numel() >= len(self.codebook):  # cheaper to project each gene once than each token
                table_GD = F.linear(self.codebook, gene_weight_DD, self.projection.bias)
                genes_BKD = F.embedding(gene_ids_BK, table_GD)
            else:
                rows_BKD = F.embedding(gene_ids_BK, self.codebook)
                genes_BKD = F.linear(rows_BKD, gene_weight_DD, self.projection.bias)
            return genes_BKD + values_BK.float()[..., None] * value_weight_D
