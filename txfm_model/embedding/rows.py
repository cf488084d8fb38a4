"""Chosen samples of a store, over chosen genes, through a model: what curation asks for when it looks for phenoprints.

What reads stores is imported when it is needed: a machine that only trains has none of it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from txfm_data.progress import Progress, ignore
from txfm_data.ragged import Ragged, concatenate
from txfm_model.embed import encoder_of
from txfm_model.embedding.encoding import EncodeOptions, check_options, over_samples, parse_layer
from txfm_model.embedding.inputs import PART_ROWS, Tokens
from txfm_model.embedding.processes import Processes
from txfm_model.embedding.samples import Panel, Part, check_panels
from txfm_model.model import TxFM

if TYPE_CHECKING:
    from txfm_data.curate.recipe import EmbeddingSpec
    from txfm_data.store.ledger import DatasetRecord
    from txfm_data.store.protocol import Store


def embed_rows(
    spec: "EmbeddingSpec",
    store: "Store",
    record: "DatasetRecord",
    rows: np.ndarray,
    panel: np.ndarray,
    out: Path,
    progress: Progress = ignore,
    *,
    device: str | None = None,
    precision: Literal["auto", "bf16", "no"] = "auto",
) -> None:
    """Embed chosen samples of a store with a TxFM checkpoint; a `txfm_data.curate.state.Embedder`.

    The values are those that `txfm embed STORE` gives the same samples, where all genes of the dataset are in `panel`. The
    checkpoint is opened for this call; memory is that of the model, of two parts of the counts and of 9 bytes a sample.

    Parameters
    ----------
    spec
        Its path is the checkpoint's folder, or the id of a model on the Hugging Face Hub.
    rows
        (n,) int64, ascending sample ids of the dataset.
    panel
        (P,) int64, ascending tokens of the store; genes outside of it are not shown to the model.
    out
        .npy file to write, (n, d) float32, whole or not at all.
    progress
        Called in samples.
    device
        Such as cpu or cuda; by default this process' GPU where there is one.
    precision
        bf16 autocast or none; auto takes bf16 on a GPU that has it.

    Raises
    ------
    ValueError, FileNotFoundError
        If no checkpoint is named or it cannot be opened, it knows none of the genes, or a sample has no library size.
    """
    from txfm_data.curate.rows import RowFile, library_sizes

    if store.values == "normalized":
        raise ValueError(f"{store.path}: holds normalised values, and a model needs counts; name a store of counts")
    if spec.path is None:
        raise ValueError(
            "embedding: kind 'checkpoint' names no model; give path in the recipe, or --model on the command line"
        )
    model = TxFM.from_pretrained(spec.path).to(Processes().device(device))
    options = EncodeOptions(
        layer=parse_layer(spec.layer), n_unmasked=spec.n_unmasked, batch_size=spec.batch_size, precision=precision
    )
    check_options(model, options)
    tokens = Tokens(store.vocabulary, model.vocabulary)
    genes, name = tokens.genes(panel), f"dataset {record.name!r}"
    shown = Panel(name=name, measured=genes, shown=genes, n_genes=len(panel), n_obs=len(rows))
    check_panels(store.path, (shown,), len(model.vocabulary))
    sizes, width, done = library_sizes(store, record, rows), model.config.width, 0
    encode = encoder_of(model, options)
    progress(0, len(rows))
    with RowFile(out, rows, width, f"{store.path}: {name}") as file:
        for ids, samples in _parts(store, record, rows):
            stop = done + len(ids)
            indptr, token_ids, counts = tokens.samples(samples)
            part = Part(
                start=done, row_id=ids, indptr=indptr, token_ids=token_ids, counts=counts, library_size=sizes[done:stop],
                panel_id=np.zeros(len(ids), np.int64),
            )  # fmt: skip

            def report(n: int, total: int, before: int = done) -> None:
                progress(before + n, len(rows))

            file.put(np.arange(done, stop), over_samples(model, part, [shown], options, width, encode, report))
            done = stop


def _parts(store: "Store", record: "DatasetRecord", rows: np.ndarray) -> Iterator[tuple[np.ndarray, Ragged]]:
    """Counts of the rows in parts of at least `PART_ROWS` (but for the last) and less than twice that, so that batches are full."""
    from txfm_data.curate.blocks import blocks_of, read_block

    held: list[tuple[np.ndarray, Ragged]] = []
    for block in blocks_of(record, rows):
        for part in read_block(store, block):
            held.append(part)
            if sum(len(ids) for ids, _ in held) >= PART_ROWS:
                yield _joined(held)
                held = []
    if held:
        yield _joined(held)


def _joined(parts: list[tuple[np.ndarray, Ragged]]) -> tuple[np.ndarray, Ragged]:
    return (
        parts[0]
        if len(parts) == 1
        else (np.concatenate([ids for ids, _ in parts]), concatenate([samples for _, samples in parts]))
    )
