"""Datasets from sources into a store: genes, labels, blocks, tables, commit."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from txfm_data.address import is_remote, redact
from txfm_data.gene_map import read_gene_map
from txfm_data.gene_matching import Genes, match_genes
from txfm_data.ingest.blocks import Block, BlockResult, BlockWork
from txfm_data.ingest.labels import Labels, Sums, check_control, obs_column, plan_labels
from txfm_data.ingest.options import IngestOptions, OtherOrganisms
from txfm_data.parallel import Pool, pool
from txfm_data.progress import Progress, ignore
from txfm_data.sources.protocol import Source
from txfm_data.store import opening
from txfm_data.store.append import Append, NewDataset, appending_all
from txfm_data.store.protocol import Sink, Store
from txfm_data.vocabulary import organism_of

_BYTES_A_VALUE_STORED = 1.2
"""A SOMA store's size per non-zero count: 1,925 B a sample of 1,876 non-zeros, measured on simulated droplet data."""


@dataclass
class _Found:
    """What blocks have found so far, over all samples of the source and all genes of the vocabulary."""

    row_sum: np.ndarray
    nnz: np.ndarray
    gene_nnz: np.ndarray
    total: float = 0

    @classmethod
    def of(cls, source: Source, n_genes: int) -> "_Found":
        return cls(np.zeros(source.n_obs), np.zeros(source.n_obs, np.int64), np.zeros(n_genes, np.int64))

    def add(self, result: BlockResult) -> None:
        rows = slice(result.start, result.start + len(result.row_sum))
        self.row_sum[rows], self.nnz[rows] = result.row_sum, result.nnz
        self.gene_nnz += result.gene_nnz
        self.total += result.total


@dataclass(frozen=True, kw_only=True)
class Job:
    """One open source to append as one dataset.

    derived : labels of the source that the store computes anew.
    """

    source: Source
    dataset: str
    options: IngestOptions
    derived: tuple[str, ...] = ()


@dataclass
class _Prepared:
    """A job whose genes are matched, whose labels are chosen, and whose samples are known to be kept or not."""

    job: Job
    content: str
    genes: Genes
    labels: Labels
    cuts: list[tuple[int, int]]
    keep: np.ndarray
    n_others: int

    def new_dataset(self) -> NewDataset:
        options = self.job.options
        is_real = options.non_integer == "ok" or options.values == "normalized"
        return NewDataset(
            name=self.job.dataset, gene_ids=self.genes.gene_ids, symbols=self.genes.symbols, values=options.values,
            modality=options.modality, source=self.job.source.name, content_sha256=self.content, backend=options.backend,
            dtype=np.dtype(np.float64 if is_real else np.uint32),
        )  # fmt: skip

    def commit(self, append: Append, found: _Found) -> dict[str, Any]:
        """Write the tables of this dataset; what was ingested."""
        source, options = self.job.source, self.job.options
        size = _library_sizes(source, self.cuts, found.row_sum, options)
        _check_not_empty(source, size, self.keep)
        if options.values == "normalized" and options.library_size is None:
            size = np.full(source.n_obs, np.nan)  # what the library was cannot be told from normalised values
        sums = Sums(found.row_sum, size, found.nnz, self.keep, len(self.genes.gene_ids))
        record = append.commit(
            gene_nnz=found.gene_nnz, nnz=int(found.nnz[self.keep].sum()), total=found.total, obs_schema=self.labels.schema,
            obs=(self.labels.table(start, stop, sums) for start, stop in self.cuts),
        )  # fmt: skip
        return {
            "dataset": record.name,
            "n_obs": record.n_obs,
            "n_dropped_empty": int((~self.keep).sum()),
            "genes_matched": int((self.genes.column_gene >= 0).sum()),
            "genes_of_other_organisms": self.n_others,
            "genes_in_file": len(self.genes.column_gene),
            "n_panel": record.n_panel,
            "nnz": record.nnz,
            "total": record.total,
        }


@dataclass(frozen=True)
class _Task:
    job: int
    block: Block


@dataclass(frozen=True)
class _Works:
    """The work of several jobs; can be sent to another process."""

    of_job: tuple[BlockWork, ...]

    def __call__(self, task: _Task) -> tuple[int, BlockResult]:
        return task.job, self.of_job[task.job](task.block)


def ingest_sources(
    jobs: Sequence[Job], store: str, *, workers: Pool | None = None, progress: Progress = ignore
) -> list[dict[str, Any]]:
    """Append several open sources to a store, each as one dataset, all of them or none.

    Blocks of all sources are worked on by the same workers, side by side.

    workers : that run already; by default those of the first job's options, for this call.
    progress : called with samples done of all; those of a source whose empty samples a first pass looks for count twice.

    Returns
    -------
    list of dict
        For each job: dataset, n_obs, n_dropped_empty, genes_matched, genes_of_other_organisms (columns left
        out), genes_in_file, n_panel, nnz, total.

    Raises
    ------
    ValueError, TypeError
        If a source or the store cannot be used as asked; the store is as before then.
    """
    if len(jobs) > 1 and is_remote(store):
        raise ValueError(
            f"{redact(store)}: datasets go to object storage one at a time; ingest them one after the other"
        )
    with pool(jobs[0].options.workers) if workers is None else nullcontext(workers) as running:
        n_looked = sum(job.source.n_obs for job in jobs if _needs_a_look(job.options))
        steps = _Steps(progress, n_looked + sum(job.source.n_obs for job in jobs))
        prepared = _prepare(jobs, store, running, steps)
        news = [part.new_dataset() for part in prepared]
        dtype = np.result_type(*(new.dtype for new in news))  # of a store that holds them all
        news = [replace(new, dtype=dtype) for new in news]
        with appending_all(store, news, [int(part.keep.sum()) for part in prepared]) as appends:
            works, found = [], []
            for part, append in zip(prepared, appends, strict=True):
                token = np.where(part.genes.column_gene >= 0, append.tokens[part.genes.column_gene], -1)
                works.append(_work(part.job, part.content, append.sink, token, append.n_genes, append.dtype))
                found.append(_Found.of(part.job.source, append.n_genes))
            tasks = (
                _Task(at, block)
                for at, (part, append) in enumerate(zip(prepared, appends, strict=True))
                for block in _blocks(part.cuts, part.keep, append.first_row)
            )
            with ExitStack() as lent:
                for work, job in zip(works, jobs, strict=True):
                    lent.enter_context(work.lend(job.source))
                for at, result in running.run(_Works(tuple(works)), tasks):
                    found[at].add(result)
                    steps.add(len(result.row_sum))
            return [part.commit(append, f) for part, append, f in zip(prepared, appends, found, strict=True)]


def _prepare(jobs: Sequence[Job], store: str, workers: Pool, steps: "_Steps") -> list[_Prepared]:
    found, schema = _open(store)
    prepared: list[_Prepared] = []
    for job in jobs:
        content = job.source.content_sha256()
        _check_distinct(job, content, prepared)
        genes, labels, n_others = _match(job, found, schema, content=content)
        _check_no_new_labels(store, found, schema, labels.schema)
        schema = labels.schema
        cuts = job.source.cuts(job.options.block_bytes())
        check_control(job.source, job.options, cuts)
        prepared.append(
            _Prepared(
                job, content, genes, labels, cuts, _kept_rows(job, content, genes, cuts, workers, steps), n_others
            )
        )
    for part in prepared:
        part.labels = replace(part.labels, schema=schema)
    return prepared


def _check_no_new_labels(address: str, store: Store | None, old: pa.Schema, new: pa.Schema) -> None:
    """Refuse, before any block is written, what a store on object storage cannot take."""
    more = [name for name in new.names if name not in old.names]
    if more and store is not None and store.datasets and is_remote(address):
        raise ValueError(
            f"{store.path}: its obs has no columns {more[:8]} ({len(more)} in all), and columns cannot be added safely on object "
            "storage; leave them out with --obs-columns, or build the store on a local disk and copy it"
        )


def _check_distinct(job: Job, content: str, others: Sequence[_Prepared]) -> None:
    for other in others:
        if other.job.dataset == job.dataset:
            raise ValueError(f"two sources are named as dataset {job.dataset!r}; give each a name of its own")
        if other.content == content:
            raise ValueError(
                f"{job.source.where}: the same contents as {other.job.source.where}; their samples would be there twice"
            )
        if other.job.options.values != job.options.values:
            raise ValueError(
                f"{job.source.where}: one source holds counts, another normalised values; a store has one unit"
            )


def _work(
    job: Job, content: str, sink: Sink | None, token: np.ndarray, n_genes: int, dtype: np.dtype[np.generic]
) -> BlockWork:
    options = job.options
    return BlockWork(
        secrets.token_hex(8), content, job.source.opener(), sink, token, n_genes, dtype, options.values, options.non_integer
    )  # fmt: skip


class _Steps:
    """Samples done of all, over all passes over all sources."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def add(self, n: int) -> None:
        self._done += n
        self._progress(self._done, self._total)


def _match(
    job: Job, store: Store | None, schema: pa.Schema, *, content: str | None = None
) -> tuple[Genes, Labels, int]:
    """Match the genes and choose the labels of a source, reading no counts; refuse what the store would refuse.

    The number is that of the columns that are genes of other organisms and are left out.
    """
    source, options = job.source, job.options
    _check_name(job.dataset)
    if store is not None:
        opening.check_new(store, job.dataset, content, options.values)
    gene_map = read_gene_map(options.gene_map) if options.gene_map is not None else _symbols_of(store)
    genes = match_genes(
        source.gene_ids, source.symbols, where=source.where, duplicates=options.duplicates,
        min_matched=options.min_matched, gene_map=gene_map, hint=source.gene_hint(),
    )  # fmt: skip
    genes, n_others = _of_the_organism(source, genes, options.other_organisms)
    return genes, plan_labels(source, options, job.dataset, schema, derived=job.derived), n_others


def _open(store: str) -> tuple[Store | None, pa.Schema]:
    """The store, if there is one, and the columns of its obs."""
    found = opening.open_store(store) if opening.exists(store) else None
    return found, found.obs_schema() if found is not None else opening.OBS_SCHEMA


def check(job: Job, store: str) -> None:
    """Refuse what an ingest would refuse before it reads counts: genes, labels, names, units."""
    _match(job, *_open(store))


def describe(job: Job, store: str) -> dict[str, Any]:
    """What an ingest would read, write and need, from its first block alone."""
    source, dataset, options = job.source, job.dataset, job.options
    genes, labels, n_others = _match(job, *_open(store))
    cuts = source.cuts(options.block_bytes())
    first = source.read(*source.cuts(1024**2)[0]) if cuts else sp.csr_matrix((0, len(source.gene_ids)))
    nnz = int(first.nnz / max(1, first.shape[0]) * source.n_obs)
    return {
        "dry_run": True,
        "dataset": dataset,
        "source": source.where,
        "store": str(store),
        "n_obs": source.n_obs,
        "genes_matched": int((genes.column_gene >= 0).sum()),
        "genes_of_other_organisms": n_others,
        "genes_in_file": len(genes.column_gene),
        "n_panel": len(genes.gene_ids),
        "nnz_estimated": nnz,
        "store_bytes_estimated": int(nnz * _BYTES_A_VALUE_STORED),
        "memory_bytes": options.workers.memory,
        "blocks": len(cuts),
        "obs_columns": sorted(labels.kept.values()),
    }


def _check_name(dataset: str) -> None:
    if not dataset or not all(c.isalnum() or c in "-_." for c in dataset):
        raise ValueError(f"dataset name {dataset!r}: use letters, digits, '-', '_' and '.' only")


def _symbols_of(store: Store | None) -> dict[str, str]:
    """Symbols of a store's own genes that name one gene alone."""
    if store is None:
        return {}
    vocabulary = store.vocabulary
    known = sorted({symbol for symbol in vocabulary.symbols if symbol})
    rows = vocabulary.index_of_symbols(known)
    return {symbol: vocabulary.gene_ids[row] for symbol, row in zip(known, rows, strict=True) if row >= 0}


def _of_the_organism(source: Source, genes: Genes, others: OtherOrganisms) -> tuple[Genes, int]:
    """The genes of the store's organism, and how many columns of others were left out, as no genes are; or those are refused."""
    is_ours = np.array([organism_of(gene) == opening.ORGANISM for gene in genes.gene_ids], bool)
    if is_ours.all():
        return genes, 0
    first = genes.gene_ids[int(np.argmin(is_ours))]
    told = (
        f"{source.where}: {int((~is_ours).sum())} of {len(is_ours)} genes are of another organism (for example {first}: "
        f"{organism_of(first)}), and a store holds {opening.ORGANISM} alone; "
    )
    if others == "error":
        raise ValueError(f"{told}leave these columns out of the source, or pass --other-organisms drop")
    if not is_ours.any():
        raise ValueError(f"{told}no gene would be left to ingest")
    place = np.where(is_ours, np.cumsum(is_ours) - 1, -1)
    ids, symbols = (tuple(np.array(names, object)[is_ours]) for names in (genes.gene_ids, genes.symbols))
    columns = np.where(genes.column_gene >= 0, place[genes.column_gene], -1)
    lost = int(((genes.column_gene >= 0) & (columns < 0)).sum())
    return replace(genes, gene_ids=ids, symbols=symbols, column_gene=columns), lost


def _blocks(cuts: list[tuple[int, int]], keep: np.ndarray, first_row: int) -> Iterator[Block]:
    for start, stop in cuts:
        part = keep[start:stop]
        yield Block(start, stop, first_row, None if part.all() else part)
        first_row += int(part.sum())


def _needs_a_look(options: IngestOptions) -> bool:
    """Whether a first pass over the counts must find the samples without a library."""
    return options.empty_samples == "drop" and options.library_size is None


def _kept_rows(
    job: Job, content: str, genes: Genes, cuts: list[tuple[int, int]], workers: Pool, steps: _Steps
) -> np.ndarray:
    """Which samples are kept, (n_obs,) bool; those without a library are found in their label, where the options name one."""
    source, options = job.source, job.options
    keep = np.ones(source.n_obs, bool)
    if options.empty_samples == "error":
        return keep
    if not _needs_a_look(options) and options.library_size is not None:
        obs_column(source, options.library_size, "--library-size")
        for start, stop in cuts:
            labels = source.obs(start, stop)[options.library_size]
            keep[start:stop] = pd.to_numeric(labels, errors="coerce").to_numpy(np.float64) != 0
    else:
        n_genes = len(genes.gene_ids)
        work, found = (
            _work(job, content, None, genes.column_gene, n_genes, np.dtype(np.float64)),
            _Found.of(source, n_genes),
        )
        with work.lend(source):
            for result in workers.run(work, _blocks(cuts, keep, 0)):
                found.add(result)
                steps.add(len(result.row_sum))
        keep = found.row_sum > 0
    if not keep.any():
        raise ValueError(f"{source.where}: no sample has any count; nothing to ingest")
    return keep


def _check_not_empty(source: Source, size: np.ndarray, keep: np.ndarray) -> None:
    empty = (size <= 0) & keep
    if empty.any():
        first = int(np.argmax(empty))
        raise ValueError(
            f"{source.where}: {int(empty.sum())} of {source.n_obs} samples have no count at all (first: "
            f"{source.obs(first, first + 1).index[0]!r}), so no library size; pass --empty-samples drop to leave them out"
        )


def _library_sizes(
    source: Source, cuts: list[tuple[int, int]], row_sum: np.ndarray, options: IngestOptions
) -> np.ndarray:
    if options.library_size is None:
        return row_sum
    obs_column(source, options.library_size, "--library-size")
    column, exact = options.library_size, options.library_is_sum
    parts = [_checked_sizes(source, start, row_sum[start:stop], column, exact=exact) for start, stop in cuts]
    return np.concatenate(parts) if parts else row_sum


def library_sizes(source: Source, start: int, part: sp.csr_matrix, column: str | None) -> np.ndarray:
    """Counts of the whole library of consecutive samples: their sums, or a column of obs. (n,) float64.

    start : row of the first sample.  part : their counts over all columns of the file.

    Raises
    ------
    ValueError
        If the column holds something that is not a number of at least the sum.
    """
    sums = np.asarray(part.sum(axis=1, dtype=np.float64)).ravel()
    if column is None:
        return sums
    obs_column(source, column, "--library-size")
    return _checked_sizes(source, start, sums, column)


def _checked_sizes(source: Source, start: int, sums: np.ndarray, column: str, *, exact: bool = False) -> np.ndarray:
    frame = source.obs(start, start + len(sums))
    sizes: np.ndarray = pd.to_numeric(frame[column], errors="coerce").to_numpy(np.float64)
    # Sums of values that are not whole may differ from their given sum in the last digits.
    wrong = ~np.isfinite(sizes) | (sizes < sums * (1 - 1e-6)) | (exact & (sizes > sums * (1 + 1e-6)))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"{source.where}: library size {sizes[first]} of sample {frame.index[first]!r} is not a number of at "
            f"least {sums[first]}, the sum of its counts here{' and, with all genes read, no more' if exact else ''} "
            f"({int(wrong.sum())} such samples); name another --library-size, or repair the source"
        )
    return sizes
