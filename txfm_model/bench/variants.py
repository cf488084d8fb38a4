"""The fast model, the plain one, and the fast one without one saving each: what `txfm bench train` compares.

A variant has the same weights and, to rounding, the same predictions, loss and gradients as the model it is made of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txfm_model.config import LossConfig
from txfm_model.encoder import Encoder
from txfm_model.losses import Loss, measured_mask
from txfm_model.model import TxFM
from txfm_model.prediction import Prediction
from txfm_model.stochastic_depth import BranchScales, branch_shares
from txfm_model.tokens import GeneTokens

LossOf = Callable[[Any, Any, Tensor], Tensor]
"""(prediction, batch, panels_NG) to the loss, a scalar."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train.

    label : for the table.  build : makes of a model the module that runs and its loss; it may change the model.
    computes_all : compute every branch of every sample, and multiply it by its scale of stochastic depth.
    masks_all : give attention a mask though no sample is padded.  is_fused : AdamW in one kernel.
    """

    label: str
    build: Callable[[TxFM], tuple[nn.Module, LossOf]]
    computes_all: bool = False
    masks_all: bool = False
    is_fused: bool = True


class AllTokensEncoder(nn.Module):
    """An encoder whose last block is computed for all tokens, and CLS taken afterwards."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, tokens_BKD: Tensor, n_unmasked_B: Tensor | None, branch_scale_RB: BranchScales | None = None
    ) -> Tensor:
        """CLS after the final norm, (B, D); `branch_scale_RB` must be given to drop branches. No padding."""
        x_BTD = torch.cat([self.encoder.cls.expand(len(tokens_BKD), 1, -1), tokens_BKD], dim=1)
        shares = branch_shares(branch_scale_RB, self.encoder.rates, x_BTD.device)
        for i, block in enumerate(self.encoder.blocks):
            x_BTD = block(x_BTD, None, x_BTD.shape[1], *shares[2 * i : 2 * i + 2])
        cls_BD: Tensor = self.encoder.norm(x_BTD)[:, 0]
        return cls_BD.float()


class GatheredTokens(nn.Module):
    """Tokens whose codebook rows are gathered first, and projected each."""

    def __init__(self, tokens: GeneTokens) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, gene_ids_BK: Tensor, values_BK: Tensor) -> Tensor:
        """Tokens, (B, K, D) float32."""
        projection = self.tokens.projection
        with torch.autocast(gene_ids_BK.device.type, enabled=False):
            rows_BKE = F.embedding(gene_ids_BK, self.tokens.codebook)
            whole_BKE = torch.cat([rows_BKE, values_BK.float()[..., None]], dim=-1)
            return whole_BKE if projection is None else projection(whole_BKE)


def dense_poisson(prediction: Prediction, batch: Any, panels_NG: Tensor) -> Tensor:
    """Poisson loss of a dense target over measured genes: mean over genes, then over samples."""
    with torch.autocast(prediction.log1p_BG.device.type, enabled=False):
        predicted_BG = prediction.log1p_BG.float()
        measured_BG = measured_mask(batch.panel_id, panels_NG)
        target_BG = torch.zeros_like(predicted_BG)
        lengths_B = batch.target_indptr.diff()
        row = torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B)
        target_BG[row, batch.target_gene_ids.long()] = torch.log1p(batch.target_counts.float())
        loss_BG = predicted_BG.exp() - target_BG.exp() * predicted_BG
        loss_B = torch.where(measured_BG, loss_BG, 0.0).sum(1) / measured_BG.sum(1).clamp_min(1)
        return loss_B.mean()


def _sparse_loss(model: TxFM) -> LossOf:
    loss = Loss.of_parts(LossConfig(), model.config)
    return lambda prediction, batch, panels_NG: loss(prediction, batch, panels_NG).loss


def _fast(model: TxFM) -> tuple[nn.Module, LossOf]:
    return model, _sparse_loss(model)


def _plain(model: TxFM) -> tuple[nn.Module, LossOf]:
    from txfm_model.plain import PlainTxFM

    return PlainTxFM.of(model), dense_poisson


def _whole_last_block(model: TxFM) -> tuple[nn.Module, LossOf]:
    model.encoder = AllTokensEncoder(model.encoder)  # type: ignore[assignment]
    return _fast(model)


def _gathered(model: TxFM) -> tuple[nn.Module, LossOf]:
    model.tokens = GatheredTokens(model.tokens)  # type: ignore[assignment]
    return _fast(model)


def _dense_loss(model: TxFM) -> tuple[nn.Module, LossOf]:
    return model, dense_poisson


def _checkpointed(model: TxFM) -> tuple[nn.Module, LossOf]:
    model.set_activation_checkpointing(True)
    return _fast(model)


VARIANTS = {
    "plain": Variant(label="plain", build=_plain, computes_all=True),
    "fast": Variant(label="fast", build=_fast),
    "last_block": Variant(label="  last block for all tokens", build=_whole_last_block),
    "gathered": Variant(label="  codebook gathered, then projected", build=_gathered),
    "dense_loss": Variant(label="  dense target and loss", build=_dense_loss),
    "all_branches": Variant(label="  branches of all samples", build=_fast, computes_all=True),
    "masked": Variant(label="  attention with a mask", build=_fast, masks_all=True),
    "unfused": Variant(label="  AdamW not fused", build=_fast, is_fused=False),
    "checkpointed": Variant(label="  activation checkpointing", build=_checkpointed),
}
"""By name. All but the first two are the fast one without one saving; the last adds a cost that saves memory."""

SAVINGS = tuple(name for name in VARIANTS if name not in ("plain", "fast"))
