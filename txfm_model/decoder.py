"""From the CLS state to what is predicted of every gene: residual MLP, gene head, activation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txfm_model.activations import Activation
from txfm_model.config import ModelConfig
from txfm_model.encoder import LAYER_NORM_EPS
from txfm_model.prediction import Prediction


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

    def forward(self, cls_BD: Tensor, n_blocks: int | None = None) -> Tensor:
        """State that the gene head reads, (B, D); or the state after the first `n_blocks` blocks."""
        x_BD = cls_BD if self.bridge is None else self.bridge(cls_BD)
        for block in self.blocks[:n_blocks]:
            x_BD = block(x_BD)
        return x_BD


class GeneHead(nn.Module):
    """Linear layer with a row for each gene, then the activation; beside it the parameters of models of counts.

    With `count_head="nb"` or `"zinb"`, `log_dispersion` is ln θ of each gene. With `"zinb"`, `zero_inflation` is a linear
    layer from CLS, as the encoder leaves it, to the logit of each gene's chance of an extra 0.
    """

    def __init__(self, n_genes: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation = Activation.of(config)
        self.weight = nn.Parameter(torch.empty(n_genes, config.width))
        self.bias = nn.Parameter(torch.empty(n_genes))
        self.log_dispersion = nn.Parameter(torch.empty(n_genes)) if config.count_head != "none" else None
        self.zero_inflation = nn.Linear(config.width, n_genes) if config.count_head == "zinb" else None

    def forward(self, x_BD: Tensor, cls_BD: Tensor, measured_BG: Tensor | None = None) -> Prediction:
        """What is predicted from the decoder's state `x_BD` and the encoder's `cls_BD`."""
        return Prediction(
            log1p_BG=self.activation(F.linear(x_BD, self.weight, self.bias), measured_BG),
            # A copy: sharded training takes a parameter's memory back when this returns, before the loss is computed.
            log_dispersion_G=None if self.log_dispersion is None else self.log_dispersion.clone(),
            zero_logits_BG=None if self.zero_inflation is None else self.zero_inflation(cls_BD),
        )
