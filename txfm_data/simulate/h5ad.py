"""One simulated dataset as an h5ad file, written block by block in AnnData's own layout."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import sparse_dataset, write_elem

from txfm_data.simulate.config import STATEMENT
from txfm_data.simulate.counts import Block, n_blocks, simulate_block
from txfm_data.simulate.design import Dataset, Design

_COMPRESSED: dict[str, Any] = {
    "chunks": (65_536,),
    "compression": "gzip",
    "compression_opts": 1,
    "shuffle": True,
}

Columns = list[tuple[h5py.Dataset, Callable[[Block], np.ndarray]]]
"""Codes of each column of obs, and what a block puts there."""


def write_h5ad(path: Path, design: Design, dataset: Dataset) -> Generator[Block, None, None]:
    """Write a dataset to a new file; yields each block of samples after it is written.

    One thread of its own does all that touches the file, and this one waits for it: a Ctrl-C that arrives while h5py is
    at work ends in one of its weak-reference callbacks, where Python ignores it.
    """
    with ThreadPoolExecutor(1) as writer, closing(_blocks_in_order(design, dataset)) as blocks:
        file = writer.submit(h5py.File, path, "w").result()
        try:
            columns = writer.submit(_create, file, design, dataset).result()
            start = 0
            for block in blocks:
                writer.submit(_append, file, columns, dataset.name, start, block).result()
                start += block.counts.shape[0]
                yield block
        finally:
            writer.submit(file.close).result()


def _create(file: h5py.File, design: Design, dataset: Dataset) -> Columns:
    """Write all but X and the rows of obs."""
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    index = pd.Index(design.genes.ids[dataset.panel], name="gene_id")
    write_elem(file, "var", pd.DataFrame({"symbol": design.genes.symbols[dataset.panel]}, index=index))
    write_elem(file, "uns", {"simulated": STATEMENT, "simulated_seed": design.config.seed})
    for part in ("layers", "obsm", "obsp", "varm", "varp"):
        write_elem(file, part, {})
    return _create_obs(file, dataset)


def _append(file: h5py.File, columns: Columns, name: str, start: int, block: Block) -> None:
    """Write one block below the rows that are there."""
    if start == 0:
        write_elem(file, "X", block.counts, dataset_kwargs={**_COMPRESSED, "indptr_dtype": np.int64})
    else:
        sparse_dataset(file["X"]).append(block.counts)
    stop = start + block.counts.shape[0]
    file["obs/_index"][start:stop] = [f"{name}_{row:08d}" for row in range(start, stop)]
    for codes, of_block in columns:
        codes[start:stop] = of_block(block)


def _create_obs(file: h5py.File, dataset: Dataset) -> Columns:
    """Lay out obs without its rows in AnnData's data frame encoding; rows are written as they come."""
    columns: dict[str, tuple[tuple[str, ...], Callable[[Block], np.ndarray]]] = {
        "batch": (dataset.batches, lambda block: block.batch),
        "cell_type": (dataset.types, lambda block: block.type),
    }
    if dataset.perturbations is not None:
        effects = pd.Categorical(dataset.perturbations.effects(), categories=["control", "null", "strong"])
        columns["perturbation"] = (dataset.perturbations.names, lambda block: block.perturbation)
        columns["simulated_effect"] = (
            tuple(effects.categories),
            lambda block: effects.codes[block.perturbation],
        )
    obs = file.create_group("obs")
    obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
    obs.attrs["column-order"] = np.array(list(columns), dtype=h5py.string_dtype())
    index = obs.create_dataset("_index", (dataset.n_obs,), h5py.string_dtype(), chunks=True)
    index.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    written = []
    for name, (categories, of_block) in columns.items():
        group = obs.create_group(name)
        group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
        write_elem(group, "categories", np.array(categories, dtype=object))
        kind = np.min_scalar_type(-len(categories))
        codes = group.create_dataset("codes", (dataset.n_obs,), kind, chunks=True)
        codes.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        written.append((codes, of_block))
    return written


def _blocks_in_order(design: Design, dataset: Dataset) -> Generator[Block, None, None]:
    """Yield blocks in order; at most `threads` are drawn ahead, so memory does not grow with the dataset."""
    threads = design.config.threads
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Block]] = deque()
    try:
        for number in range(n_blocks(dataset)):
            waiting.append(pool.submit(simulate_block, design.config.seed, design.genes, dataset, number))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
