"""What `txfm embed` and `txfm impute` can read: files, our stores, shard corpora, each as a `SampleInput`.

What only some machines have (tiledbsoma, zarr, anndata) is imported by the readers of `txfm_data`, when they are asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from txfm_data.matching import Duplicates, match_columns
from txfm_data.vocabulary import Vocabulary
from txfm_model.embedding.samples import Panel, Part, SampleInput, check_panels, part_of_rows

if TYPE_CHECKING:
    from shards.manifest import Corpus
    from txfm_data.sources.protocol import Source
    from txfm_data.store.protocol import Store

PART_BYTES = 16 * 1024**2
"""Counts of one part of a file in memory."""
FILE_ROWS, PART_ROWS = 8_192, 1_024
"""Samples of one part of a file, at most, and of a store."""
_OBS_ROWS = 65_536
_WAYS = "an h5ad file, AnnData in Zarr, a store or a shard corpus"


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """How an input is read; see `tools.sample_options` for the meaning of each."""

    counts_layer: str | None = None
    raw: bool = False
    gene_ids: str | None = None
    symbols: str | None = None
    library_size: str | None = None
    duplicates: Duplicates = "error"
    non_integer: Literal["error", "ok"] = "error"
    min_cell_fraction: float = 0.0
    dataset: str | None = None
    obs_filter: str | None = None
    split: Literal["all", "train", "val"] = "all"


_OF_FILES = ("counts_layer", "raw", "gene_ids", "symbols", "library_size", "duplicates", "non_integer")
_OF_STORES = ("dataset", "obs_filter")
_OF_SHARDS = ("split",)


def open_input(path: str | Path, vocabulary: Vocabulary, options: InputOptions) -> SampleInput:
    """Open what is at `path`, told by what lies there.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is nothing, it is of no known kind or damaged, it holds no counts, an option does not go with it, or none of
        its genes is the model's.
    """
    kind = kind_of(path)
    _refuse_options(path, kind, options)
    opened: SampleInput
    if kind in ("h5ad", "zarr"):
        opened = SourceInput(_open_source(path, kind, options), kind, vocabulary, options)
    elif kind == "shards":
        from shards.manifest import Corpus

        opened = CorpusInput(Corpus(path), vocabulary, options)
    else:
        from txfm_data.store.opening import open_store

        opened = StoreInput(open_store(path), vocabulary, options)
    try:
        if opened.n_obs == 0:
            raise ValueError(f"{opened.where}: holds no sample; nothing was written")
        check_panels(opened.where, opened.panels, len(vocabulary))
    except BaseException:
        opened.close()
        raise
    return opened


def kind_of(path: str | Path) -> str:
    """Tell "h5ad", "zarr" (AnnData), "store" or "shards" by what is at `path`."""
    import json

    from txfm_data.address import exists, is_remote, join, local_path

    if str(path).partition("?")[0].endswith(".h5ad"):
        return "h5ad"
    if is_remote(path):
        return "shards" if exists(join(path, "manifest.json")) else "store"
    folder = local_path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{path}: nothing there; give the path of {_WAYS}")
    if folder.is_file():
        return "h5ad"
    if (folder / "manifest.json").is_file():
        return "shards"
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        raise ValueError(f"{path}: a checkpoint, which goes to --model; give the path of {_WAYS}")
    if (folder / ".zgroup").is_file():
        return "zarr"
    if (folder / "zarr.json").is_file():
        try:
            attributes = json.loads((folder / "zarr.json").read_bytes())["attributes"]
        except (ValueError, KeyError, TypeError):
            return "zarr"  # which says what is wrong with it
        return "store" if "txfm_format" in attributes else "zarr"
    return "store"


def _refuse_options(path: str | Path, kind: str, options: InputOptions) -> None:
    own = {"h5ad": _OF_FILES, "zarr": _OF_FILES, "store": _OF_STORES, "shards": _OF_SHARDS}[kind]
    default = InputOptions()
    for name in (*_OF_FILES, *_OF_STORES, *_OF_SHARDS):
        if name not in own and getattr(options, name) != getattr(default, name):
            flag = "--" + name.replace("_", "-")
            noun = {"h5ad": "an h5ad file", "zarr": "AnnData in Zarr", "store": "a store", "shards": "a shard corpus"}
            raise ValueError(f"{path}: {flag} does not apply to {noun[kind]}; leave it out")
    if kind == "shards" and options.min_cell_fraction:
        raise ValueError(
            f"{path}: --min-cell-fraction does not apply to a shard corpus, whose genes were chosen when it was built"
        )


@contextmanager
def _own_flags() -> Iterator[None]:
    """Readers name the flags of `txfm ingest` in their messages; here one of them is called otherwise."""
    try:
        yield
    except ValueError as error:
        said = str(error).replace("--layer", "--counts-layer")
        said = said.replace("; if they are normalised, --values normalized", "")
        raise ValueError(said) from error


def _open_source(path: str | Path, kind: str, options: InputOptions) -> "Source":
    named = {
        "layer": options.counts_layer, "raw": options.raw, "gene_ids": options.gene_ids, "symbols": options.symbols,
    }  # fmt: skip
    with _own_flags():
        if kind == "zarr":
            from txfm_data.sources.anndata_zarr import open_anndata_zarr

            return open_anndata_zarr(str(path), **named)
        from txfm_data.sources.h5ad import open_h5ad

        return open_h5ad(str(path), **named)


class SourceInput:
    """An h5ad file or AnnData in Zarr. Its one panel is all its genes; a library size is the sum of a row, or a label."""

    def __init__(self, source: "Source", kind: str, vocabulary: Vocabulary, options: InputOptions) -> None:
        self._source, self._options = source, options
        self.where, self.kind, self.n_obs = source.where, kind, source.n_obs
        try:
            match = match_columns(
                vocabulary, source.gene_ids, source.symbols, duplicates=options.duplicates, where=source.where
            )
            self._column_of, self._tokens = match.column_of, match.token_ids
            with _own_flags():
                self._cuts = [
                    (low, min(low + FILE_ROWS, stop))
                    for start, stop in source.cuts(PART_BYTES)
                    for low in range(start, stop, FILE_ROWS)
                ]
            self.n_parts = len(self._cuts)
            measured = np.sort(match.token_ids[match.token_ids >= 0]).astype(np.int64)
            panel = Panel(
                name=source.name,
                measured=measured,
                shown=self._shown(measured),
                n_genes=len(source.gene_ids),
                n_obs=self.n_obs,
            )
        except BaseException:
            source.close()
            raise
        self.panels: tuple[Panel, ...] = (panel,)
        self.about = {
            "matrix": source.matrix_name, "library_size": options.library_size or "row sums", "genes_matched": match.n_matched,
            "genes_in_file": len(source.gene_ids),
        }  # fmt: skip

    def _shown(self, measured: np.ndarray) -> np.ndarray:
        """Genes above zero in enough samples; all unless there is such a bound."""
        fraction = self._options.min_cell_fraction
        if not fraction:
            return measured
        expressed = np.zeros(len(self._tokens), np.int64)
        for start, stop in self._cuts:
            with _own_flags():
                rows = self._by_gene(self._source.read(start, stop))
            expressed += np.bincount(rows.indices[rows.data > 0], minlength=len(expressed))
        enough = (expressed >= np.ceil(fraction * self.n_obs)) & (self._tokens >= 0)
        if not enough.any():
            raise ValueError(
                f"{self.where}: no matched gene is above zero in {fraction:.0%} of its {self.n_obs} samples; "
                "lower --min-cell-fraction"
            )
        return np.sort(self._tokens[enough]).astype(np.int64)

    def _by_gene(self, rows: Any) -> Any:
        """The same counts with those of a gene's several columns in one."""
        import scipy.sparse as sp

        moved = sp.csr_matrix((rows.data, self._column_of[rows.indices], rows.indptr), shape=rows.shape)
        moved.sum_duplicates()
        return moved

    def rows_of(self, number: int) -> int:
        """Samples of part `number`."""
        start, stop = self._cuts[number]
        return stop - start

    def read(self, number: int) -> Part:
        """Rows of the file, every value checked."""
        from txfm_data.ingest import check_counts, library_sizes

        start, stop = self._cuts[number]
        with _own_flags():
            rows = self._source.read(start, stop)
            check_counts(rows, self._source, start, non_integer=self._options.non_integer)
            sizes = library_sizes(self._source, start, rows, self._options.library_size)
        return part_of_rows(self._by_gene(rows), self._tokens, sizes, start)

    def name_of(self, position: int) -> str:
        """Name of a sample in the index of obs."""
        return f"sample {self._source.obs(position, position + 1).index[0]!r}"

    def obs(self) -> Callable[[], Iterator[tuple[np.ndarray, Any]]]:
        """Labels as the file has them."""
        from txfm_data.obs_columns import frame_table

        def parts() -> Iterator[tuple[np.ndarray, Any]]:
            for start in range(0, self.n_obs, _OBS_ROWS):
                stop = min(start + _OBS_ROWS, self.n_obs)
                yield np.arange(start, stop), frame_table(self._source.obs(start, stop))

        return parts

    def close(self) -> None:
        """Close the file."""
        self._source.close()


class Tokens:
    """Translates gene ids of a store or corpus to tokens of the model."""

    def __init__(self, own: Vocabulary, model: Vocabulary) -> None:
        self._token = model.index_of(own.gene_ids).astype(np.int64)
        self.n_matched = int((self._token >= 0).sum())

    def genes(self, gene_ids: np.ndarray) -> np.ndarray:
        """Ascending tokens of the genes that the model knows."""
        tokens = self._token[gene_ids]
        return np.sort(tokens[tokens >= 0])

    def samples(self, ragged: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index, tokens and counts of ragged samples, of known genes alone."""
        tokens = self._token[ragged.gene_ids]
        kept = tokens >= 0
        before = np.concatenate([[0], np.cumsum(kept)])
        return before[ragged.indptr].astype(np.int64), tokens[kept], ragged.counts[kept]


class StoreInput:
    """A store: all its samples, those of one dataset, or those that a filter on obs leaves; each dataset has its panel.

    Library sizes are ``raw_sum``, 8 bytes a sample in memory; a filter takes 8 more.
    """

    kind = "store"

    def __init__(self, store: "Store", vocabulary: Vocabulary, options: InputOptions) -> None:
        self.where, self._store = store.path, store
        if store.values == "normalized":
            raise ValueError(f"{store.path}: holds normalised values, and a model needs counts; name a store of counts")
        records = store.datasets if options.dataset is None else (store.dataset(options.dataset),)
        self._tokens = Tokens(store.vocabulary, vocabulary)
        self._first = records[0].obs_start if records else 0
        self._stop = records[-1].obs_stop if records else 0
        self._starts = np.array([record.obs_start for record in records], np.int64)
        self.panels = tuple(self._panel(record, options.min_cell_fraction) for record in records)
        # With a filter the samples are listed; without one they are a range
        self._ids, self._sizes = self._choose(options.obs_filter)
        self.n_obs = self._stop - self._first if self._ids is None else len(self._ids)
        if self._ids is not None and not self.n_obs:
            raise ValueError(f"{store.path}: no sample fits --obs-filter {options.obs_filter!r}")
        self._cuts = self._make_cuts()
        self.n_parts = len(self._cuts)
        self.about = {
            "library_size": "raw_sum of the store", "genes_matched": self._tokens.n_matched,
            "genes_in_file": len(store.vocabulary), "datasets": ", ".join(record.name for record in records),
            "obs_filter": options.obs_filter or "none",
        }  # fmt: skip

    def _panel(self, record: Any, fraction: float) -> Panel:
        genes = self._store.panel(record)
        shown = genes
        if fraction:
            shown = genes[self._store.gene_nnz(record)[genes] >= np.ceil(fraction * record.n_obs)]
        return Panel(
            name=f"dataset {record.name!r}", measured=self._tokens.genes(genes), shown=self._tokens.genes(shown),
            n_genes=len(genes), n_obs=record.n_obs,
        )  # fmt: skip

    def _choose(self, obs_filter: str | None) -> tuple[np.ndarray | None, np.ndarray]:
        """Ids of the chosen samples, ascending (None: the whole range), and their library sizes."""
        n = self._stop - self._first
        if obs_filter is None:
            sizes = np.full(n, np.nan)
            for part in self._store.obs_parts(["soma_joinid", "raw_sum"]):
                ids = part["soma_joinid"].to_numpy()
                inside = (ids >= self._first) & (ids < self._stop)
                sizes[ids[inside] - self._first] = part["raw_sum"].to_numpy()[inside]
            return None, sizes
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for part in self._store.obs_parts(["soma_joinid", "raw_sum"], obs_filter):
            ids = part["soma_joinid"].to_numpy()
            inside = (ids >= self._first) & (ids < self._stop)
            found.append((ids[inside], part["raw_sum"].to_numpy()[inside]))
        ids = np.concatenate([f[0] for f in found]) if found else np.empty(0, np.int64)
        sizes = np.concatenate([f[1] for f in found]) if found else np.empty(0)
        order = np.argsort(ids, kind="stable")
        return ids[order], sizes[order]

    def _make_cuts(self) -> list[tuple[int, int]]:
        if self._ids is not None:
            return [(low, min(low + PART_ROWS, self.n_obs)) for low in range(0, self.n_obs, PART_ROWS)]
        edges = [*(self._starts - self._first).tolist(), self.n_obs]
        return [
            (low, min(low + PART_ROWS, stop))
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
            for low in range(start, stop, PART_ROWS)
        ]

    def rows_of(self, number: int) -> int:
        """Samples of part `number`."""
        start, stop = self._cuts[number]
        return stop - start

    def read(self, number: int) -> Part:
        """Samples of the store, at most `PART_ROWS`."""
        low, high = self._cuts[number]
        if self._ids is None:
            ids = np.arange(low, high) + self._first
            ((_, ragged),) = self._store.scan(int(ids[0]), int(ids[-1]) + 1, rows=PART_ROWS)
        else:
            ids = self._ids[low:high]
            ragged = self._store.read_rows(ids)
        indptr, tokens, counts = self._tokens.samples(ragged)
        return Part(
            start=low, row_id=ids, indptr=indptr, token_ids=tokens, counts=counts, library_size=self._sizes[low:high],
            panel_id=np.searchsorted(self._starts, ids, side="right") - 1,
        )  # fmt: skip

    def name_of(self, position: int) -> str:
        """Row of a sample in the store."""
        return f"sample {self._first + position if self._ids is None else int(self._ids[position])}"

    def obs(self) -> Callable[[], Iterator[tuple[np.ndarray, Any]]]:
        """All columns of the store's obs, named by ``soma_joinid``."""
        import pyarrow as pa

        from txfm_data.obs_columns import INDEX

        def parts() -> Iterator[tuple[np.ndarray, Any]]:
            for part in self._store.obs_parts():
                ids = part["soma_joinid"].to_numpy()
                at = ids - self._first if self._ids is None else np.searchsorted(self._ids, ids)
                inside = (at >= 0) & (at < self.n_obs)
                if self._ids is not None:
                    inside &= self._ids[np.minimum(at, self.n_obs - 1)] == ids
                rows = np.flatnonzero(inside)
                rows = rows[np.argsort(at[rows], kind="stable")]
                table = part.take(pa.array(rows))
                names = [str(joinid) for joinid in ids[rows].tolist()]
                yield at[rows], table.append_column(INDEX, pa.array(names, pa.large_string()))

        return parts

    def close(self) -> None:
        """Do nothing: a store holds no file open."""


class CorpusInput:
    """A shard corpus: the samples of its splits in the order of storage; each dataset has its panel."""

    kind = "shards"

    def __init__(self, corpus: "Corpus", vocabulary: Vocabulary, options: InputOptions) -> None:
        from shards.blocks import BlockReader

        self._corpus, self.where = corpus, str(corpus.address)
        self._tokens = Tokens(corpus.vocabulary, vocabulary)
        splits = ("train", "val") if options.split == "all" else (options.split,)
        self._readers = {split: BlockReader(corpus, split) for split in splits}
        self._blocks = [
            (split, number, entry.samples) for split in splits for number, (_, entry) in enumerate(corpus.blocks(split))
        ]
        self._starts = np.concatenate([[0], np.cumsum([samples for _, _, samples in self._blocks])]).astype(np.int64)
        self.n_obs, self.n_parts = int(self._starts[-1]), len(self._blocks)
        self._names = [entry.name for entry in corpus.manifest.datasets]
        of_panel: dict[int, list[Any]] = {}
        for entry in corpus.manifest.datasets:
            of_panel.setdefault(entry.panel_id, []).append(entry)
        self.panels = tuple(self._panel(number, of_panel.get(number, [])) for number in range(len(corpus.panels)))
        self.about = {
            "library_size": "as in the shards", "genes_matched": self._tokens.n_matched, "genes_in_file": len(corpus.vocabulary),
            "datasets": ", ".join(self._names), "split": options.split, "corpus": corpus.fingerprint,
        }  # fmt: skip

    def _panel(self, number: int, entries: list[Any]) -> Panel:
        own = self._corpus.panels.genes(number).astype(np.int64)
        genes = self._tokens.genes(own)
        names = " and ".join(repr(entry.name) for entry in entries) or f"panel {number}"
        return Panel(
            name=f"dataset {names}", measured=genes, shown=genes, n_genes=len(own),
            n_obs=sum(entry.n_train + entry.n_val for entry in entries),
        )  # fmt: skip

    def rows_of(self, number: int) -> int:
        """Samples of part `number`, which is a block."""
        return self._blocks[number][2]

    def read(self, number: int) -> Part:
        """Samples of one block, checked as in training."""
        split, position, _ = self._blocks[number]
        block = self._readers[split].read(position)
        indptr, tokens, counts = self._tokens.samples(block.samples())
        return Part(
            start=int(self._starts[number]), row_id=block.sample_id, indptr=indptr, token_ids=tokens, counts=counts,
            library_size=block.library_size, panel_id=block.panel_id.astype(np.int64),
        )  # fmt: skip

    def name_of(self, position: int) -> str:
        """Sample id: its row of the store that the corpus was built from."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return f"sample {self.read(number).row_id[position - self._starts[number]]}"

    def obs(self) -> Callable[[], Iterator[tuple[np.ndarray, Any]]]:
        """sample_id, dataset, split, library_size, and the columns of obs that the blocks carry."""
        import pyarrow as pa

        from txfm_data.obs_columns import INDEX

        names = pa.array(self._names, pa.large_string())

        def parts() -> Iterator[tuple[np.ndarray, Any]]:
            for number, (split, position, samples) in enumerate(self._blocks):
                block = self._readers[split].read(position)
                ids = block.sample_id
                columns: dict[str, Any] = {
                    INDEX: pa.array([str(i) for i in ids.tolist()], pa.large_string()), "sample_id": pa.array(ids),
                    "dataset": pa.DictionaryArray.from_arrays(pa.array(block.dataset), names),
                    "split": pa.DictionaryArray.from_arrays(pa.array(np.zeros(samples, np.int32)), pa.array([split])),
                    "library_size": pa.array(block.library_size),
                }  # fmt: skip
                columns |= {name: block.obs.column(name) for name in block.obs.schema.names}
                yield np.arange(samples) + self._starts[number], pa.table(columns)

        return parts

    def close(self) -> None:
        """Do nothing: blocks are opened one by one."""
