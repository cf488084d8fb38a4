"""TxFM: the model, its loss, training, checkpoint and use.

Shape suffixes of tensor names in this package::

    B samples in the batch   N panels (in embed.py: samples)   S steps
    G genes in vocabulary    P genes shown or measured         K unmasked genes
    T tokens (K and CLS)     Q tokens that ask                 H heads
    D width                  E width of the codebook           C width of a head
    F hidden width of an MLP R residual branches
"""

from txfm_model.checkpoint import checkpoint_info, load_checkpoint, save_checkpoint, verify_checkpoint
from txfm_model.config import (
    LoopConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
)
from txfm_model.embed import embed_samples
from txfm_model.genes import export_genes
from txfm_model.losses import Loss, LossParts, poisson_loss
from txfm_model.model import TxFM
from txfm_model.prediction import Prediction
from txfm_model.stochastic_depth import branch_scales, stochastic_depth_rates
from txfm_model.trainer import train

__all__ = [
    "LoopConfig",
    "Loss",
    "LossConfig",
    "LossParts",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "Prediction",
    "TrainConfig",
    "TxFM",
    "branch_scales",
    "checkpoint_info",
    "config_from_dict",
    "config_to_dict",
    "embed_samples",
    "export_genes",
    "load_checkpoint",
    "poisson_loss",
    "save_checkpoint",
    "stochastic_depth_rates",
    "train",
    "verify_checkpoint",
]
