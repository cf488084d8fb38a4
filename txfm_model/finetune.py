"""Start a model from another's weights: every gene that both know keeps its rows, the rest stays as it was initialised."""

import logging
from typing import NamedTuple

import numpy as np
import torch

from txfm_model.model import TxFM

logger = logging.getLogger(__name__)

GENE_PARAMETERS = (
    "tokens.codebook",
    "head.weight",
    "head.bias",
    "head.log_dispersion",
    "head.zero_inflation.weight",
    "head.zero_inflation.bias",
)
"""Parameters with a row for each gene; which of the last three a model has depends on its count head."""
SAME_SHAPE = ("width", "blocks", "heads", "mlp_ratio", "tokens", "decoder_blocks")
SAME_UNITS = ("preprocessing", "target_sum")


class InitCounts(NamedTuple):
    """Genes of both models, of the new one alone (fresh rows), and of the source alone (left out)."""

    shared: int
    new: int
    left_out: int


@torch.no_grad()
def start_from(model: TxFM, source: TxFM) -> InitCounts:
    """Copy the weights of `source` into `model`, gene rows by Ensembl id; new genes keep the rows they have.

    Parameters
    ----------
    model
        Initialised for its own corpus; changed in place, on its device. Without the parts that the source's count head
        does not have: they stay as they are.
    source
        Model to start from, as opened from a checkpoint.

    Raises
    ------
    ValueError
        If shapes or units of values differ, or if the models share no gene; nothing is changed then.
    """
    _check_fits(model, source)
    rows = model.vocabulary.index_of(source.vocabulary.gene_ids)
    found = np.flatnonzero(rows >= 0)
    if len(found) == 0:
        raise ValueError(
            f"the checkpoint to start from and the corpus share no gene: {source.vocabulary.gene_ids[0]} and "
            f"{len(source.vocabulary)} in all, {model.vocabulary.gene_ids[0]} and {len(model.vocabulary)} in all; "
            f"start from a checkpoint of the same organism"
        )
    ours, theirs = model.state_dict(), source.state_dict()
    _check_parameters(model, source)
    to, of = torch.from_numpy(rows[found].astype(np.int64)), torch.from_numpy(found)
    for name in ours.keys() & theirs.keys():
        if name in GENE_PARAMETERS:
            values = theirs[name][of.to(theirs[name].device)]
            ours[name][to.to(ours[name].device)] = values.to(ours[name])
        else:
            ours[name].copy_(theirs[name])
    counts = InitCounts(len(found), len(model.vocabulary) - len(found), len(source.vocabulary) - len(found))
    _report(model, source, counts)
    return counts


def _check_fits(model: TxFM, source: TxFM) -> None:
    for fields, why in (
        (SAME_SHAPE, "the networks are of different shape; set model.{0} to {1!r}"),
        (SAME_UNITS, "values would be in other units; build shards and configure the run with model.{0} {1!r}"),
    ):
        for field in fields:
            ours, theirs = getattr(model.config, field), getattr(source.config, field)
            if ours != theirs:
                raise ValueError(
                    f"model.{field} is {ours!r}, in the checkpoint to start from {theirs!r}: "
                    + why.format(field, theirs)
                )


def _check_parameters(model: TxFM, source: TxFM) -> None:
    """Outside the count head, both models have the same parameters, but for the number of genes."""
    ours, theirs = model.state_dict(), source.state_dict()
    for name in sorted(ours.keys() ^ theirs.keys()):
        if name not in GENE_PARAMETERS:
            raise ValueError(f"{name} is in one of the two models alone; they are of different shape")
    for name in sorted(ours.keys() & theirs.keys()):
        skip = 1 if name in GENE_PARAMETERS else 0
        if ours[name].shape[skip:] != theirs[name].shape[skip:]:
            raise ValueError(
                f"{name} is {tuple(ours[name].shape)}, in the checkpoint to start from {tuple(theirs[name].shape)}"
            )


def _report(model: TxFM, source: TxFM, counts: InitCounts) -> None:
    logger.info("start from a checkpoint: %d genes shared, %d new, %d left out", *counts)
    ours, theirs = model.state_dict().keys(), source.state_dict().keys()
    if ours - theirs:
        logger.info("start from a checkpoint: it has no %s, which starts fresh", ", ".join(sorted(ours - theirs)))
    if theirs - ours:
        logger.info("start from a checkpoint: its %s is left out", ", ".join(sorted(theirs - ours)))
    for field in ("activation", "tanh_scale"):
        if getattr(model.config, field) != getattr(source.config, field):
            logger.warning(
                "model.%s is %r, in the checkpoint to start from %r: its gene head was trained for the latter",
                field,
                getattr(model.config, field),
                getattr(source.config, field),
            )
