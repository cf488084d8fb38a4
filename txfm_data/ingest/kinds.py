"""One function for each kind of source; what they share is in `IngestOptions` and `ingest.run`."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from txfm_data.address import is_remote, join
from txfm_data.config_tree import did_you_mean
from txfm_data.ingest.options import IngestOptions
from txfm_data.ingest.run import Job, check, describe, ingest_sources
from txfm_data.parallel import Pool, pool
from txfm_data.progress import Progress, ignore
from txfm_data.sources.protocol import Source
from txfm_data.store import opening

if TYPE_CHECKING:
    from txfm_data.sources.census_plan import CensusPlan, CensusSlice


def _ingest(
    source: Source, store: str | Path, dataset: str, options: dict[str, Any], dry_run: bool, progress: Progress
) -> dict[str, Any]:
    job = Job(source=source, dataset=dataset, options=IngestOptions(**options))
    if dry_run:
        return describe(job, join(store))
    return {"store": join(store)} | ingest_sources([job], join(store), progress=progress)[0]


def _absolute(path: str | Path | None) -> str | None:
    """A path that means the same in another process, which may have another current folder."""
    return None if path is None else join(path)


def h5ad(
    path: str | Path,
    store: str | Path,
    dataset: str,
    *,
    layer: str | None = None,
    raw: bool = False,
    gene_ids: str | None = None,
    symbols: str | None = None,
    dry_run: bool = False,
    progress: Progress = ignore,
    **options: Any,
) -> dict[str, Any]:
    """Ingest an h5ad file as one dataset of a store.

    Parameters
    ----------
    path, store
        Local paths, or addresses that fsspec and TileDB know (``s3://bucket/name``).
    layer, raw
        Read a layer, or ``raw.X``, in place of X.
    gene_ids, symbols
        Columns of var: Ensembl gene ids (default: the index) and symbols.
    dry_run
        Write nothing; return what would be read, written and needed.
    progress
        Called with samples done of all.
    **options
        Fields of `IngestOptions`.

    Returns
    -------
    dict
        store, and as `ingest.run.ingest_sources`; or as `ingest.run.describe` for a dry run.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        If the file or the store cannot be used as asked; the store is as before then.
    """
    from txfm_data.sources.h5ad import H5adSource

    with H5adSource(join(path), layer=layer, raw=raw, gene_ids=gene_ids, symbols=symbols) as source:
        return _ingest(source, store, dataset, options, dry_run, progress)


def tenx(
    path: str | Path,
    store: str | Path,
    dataset: str,
    *,
    feature_type: str = "Gene Expression",
    genome: str | None = None,
    sample_table: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress = ignore,
    **options: Any,
) -> dict[str, Any]:
    """Ingest a 10x Genomics ``.h5`` file or mtx folder; see `h5ad` for what is common and `TenxSource` for the rest."""
    from txfm_data.sources.tenx import TenxSource

    with TenxSource(
        join(path), sample_table=_absolute(sample_table), feature_type=feature_type, genome=genome
    ) as source:
        result = _ingest(source, store, dataset, options, dry_run, progress)
        return result | {"features_left_out": dict(source.left_out)}


def gct(
    path: str | Path,
    store: str | Path,
    dataset: str,
    *,
    sample_table: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress = ignore,
    **options: Any,
) -> dict[str, Any]:
    """Ingest a GCT file of gene counts, as GTEx gives them; see `h5ad` for what is common and `GctSource` for the rest."""
    from txfm_data.sources.gct import GctSource

    with GctSource(join(path), sample_table=_absolute(sample_table)) as source:
        return _ingest(source, store, dataset, {"modality": "bulk"} | options, dry_run, progress)


def star(
    folder: str | Path,
    store: str | Path,
    dataset: str,
    *,
    sample_sheet: str | Path | None = None,
    column: str = "unstranded",
    sample_name: str = "sample_id",
    sample_table: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress = ignore,
    **options: Any,
) -> dict[str, Any]:
    """Ingest a folder of STAR gene counts, as the GDC gives TCGA; see `h5ad` for what is common, `StarSource` for the rest."""
    from txfm_data.sources.star import StarSource

    with StarSource(
        join(folder), sample_sheet=sample_sheet, column=column, sample_name=sample_name, sample_table=sample_table
    ) as source:
        return _ingest(source, store, dataset, {"modality": "bulk"} | options, dry_run, progress)


def table(
    path: str | Path,
    store: str | Path,
    dataset: str,
    *,
    orientation: Literal["genes-by-samples", "samples-by-genes"],
    symbol_column: str | None = None,
    skip_columns: tuple[str, ...] = (),
    sample_table: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress = ignore,
    **options: Any,
) -> dict[str, Any]:
    """Ingest a TSV or CSV matrix; see `h5ad` for what is common and `TableSource` for the rest."""
    from txfm_data.sources.table import TableSource

    with TableSource(
        join(path),
        orientation=orientation,
        symbol_column=symbol_column,
        skip_columns=skip_columns,
        sample_table=sample_table,
    ) as source:
        return _ingest(source, store, dataset, {"modality": "bulk"} | options, dry_run, progress)


def census(
    store: str | Path,
    *,
    version: str | None = None,
    uri: str | None = None,
    organism: str = "homo_sapiens",
    obs_filter: str | None = None,
    var_filter: str | None = None,
    dataset_ids: Sequence[str] | str | Path | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    include_non_primary: bool = False,
    tiledb_config: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    progress: Progress = ignore,
    **options: Any,
) -> dict[str, Any]:
    """Ingest a slice of the CELLxGENE Census, one dataset of the store for each of its datasets.

    Datasets are appended in groups, each all or nothing: a large one alone, small ones together. One that the store holds already
    from the same slice is left as it is, so that a call that was stopped goes on where it was.

    Parameters
    ----------
    version, uri
        A release (``2025-11-08``, ``stable``, ``latest``), or the address of a copy of one or of a store.
    obs_filter, var_filter
        Samples and genes to take, in the Census' language (`txfm_data.obs_filter`).
    dataset_ids
        Only these: a sequence, or a file with one id a line.
    max_samples, seed
        A random subset of the slice; it depends on nothing but the seed and the samples.
    include_non_primary
        Take copies of samples in other datasets too.
    tiledb_config
        Further settings of TileDB: proxy, region, keys' profile.
    **options
        Fields of `IngestOptions`. By default ``cell_type`` is the column of that name, ``library_size`` is ``raw_sum``, and
        samples without counts are dropped.

    Returns
    -------
    dict
        store, plan (as `CensusPlan.describe`), datasets (as `ingest.run.ingest_sources`), there_already (names),
        n_obs (of the datasets ingested by this call).

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        If the release, the filter or the store cannot be used as asked.
    """
    from txfm_data.sources.census_plan import plan
    from txfm_data.sources.census_release import open_census

    with open_census(version, uri, tiledb_config=tiledb_config) as release:
        found = plan(
            release, organism=organism, obs_filter=obs_filter, var_filter=var_filter, dataset_ids=_ids(dataset_ids),
            max_samples=max_samples, seed=seed, include_non_primary=include_non_primary,
        )  # fmt: skip
        described = found.describe()
        chosen = IngestOptions(
            **_CENSUS_DEFAULTS | {"library_is_sum": var_filter is None and not release.is_ours} | options
        )
        result: dict[str, Any] = {
            "store": join(store),
            "plan": described,
            "datasets": [],
            "there_already": [],
            "n_obs": 0,
        }
        if dry_run:
            result["there_already"] = _check_slices(found, store, chosen)
            return result | {"dry_run": True, "memory_bytes": chosen.workers.memory}
        with pool(chosen.workers) as workers:
            done = 0
            for group in _groups(found.datasets, one_by_one=is_remote(store)):
                _ingest_group(found, group, join(store), chosen, workers, result, _from(progress, done, found.n_obs))
                done += sum(part.n_obs for part in group)
        result["n_obs"] = sum(ingested["n_obs"] for ingested in result["datasets"])
    return result


_CENSUS_DEFAULTS: dict[str, Any] = {"cell_type": "cell_type", "library_size": "raw_sum", "empty_samples": "drop"}
_CENSUS_DERIVED = (
    "dataset_id",
    "observation_joinid",
    "raw_sum",
    "nnz",
    "raw_mean_nnz",
    "n_measured_vars",
    "is_primary_data",
)
"""Columns of the Census that every store has, and computes anew or takes over."""


def _ingest_group(
    found: "CensusPlan", group: Sequence["CensusSlice"], store: str, options: IngestOptions, workers: Pool,
    result: dict[str, Any], progress: Progress,
) -> None:  # fmt: skip
    """Append those datasets of a group that the store has not got, all of them or none; adds to `result`."""
    with ExitStack() as sources:
        jobs = []
        for part in group:
            source = sources.enter_context(found.source(part))
            if _is_there(store, part.dataset_id, source):
                result["there_already"].append(part.dataset_id)
            else:
                jobs.append(Job(source=source, dataset=part.dataset_id, options=options, derived=_CENSUS_DERIVED))
        if jobs:
            result["datasets"] += ingest_sources(jobs, store, workers=workers, progress=progress)


def _from(progress: Progress, before: int, total: int) -> Progress:
    """Progress of one part of the whole: `before` samples are done already."""
    return lambda done, _: progress(before + done, total)


_GROUP_SAMPLES, _GROUP_DATASETS = 2**17, 32
"""A group of Census datasets is committed when it has so many of either: many small ones together, a large one alone."""


def _groups(parts: Sequence["CensusSlice"], *, one_by_one: bool) -> Iterator[list["CensusSlice"]]:
    """Consecutive datasets that are appended together; `one_by_one` on object storage."""
    group: list[CensusSlice] = []
    for part in parts:
        group.append(part)
        if one_by_one or len(group) == _GROUP_DATASETS or sum(p.n_obs for p in group) >= _GROUP_SAMPLES:
            yield group
            group = []
    if group:
        yield group


def _ids(given: Sequence[str] | str | Path | None) -> list[str] | None:
    """Dataset ids, of a sequence or one a line of a file; lines that begin with # are comments."""
    if given is None or not isinstance(given, str | Path):
        return None if given is None else list(given)
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a text file with one Census dataset id a line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    ids = [line for line in lines if line and not line.startswith("#")]
    if not ids:
        raise ValueError(f"{path}: names no dataset; write one Census dataset id a line")
    return ids


def _check_slices(found: "CensusPlan", store: str | Path, options: IngestOptions) -> list[str]:
    """Refuse what an ingest would refuse, without reading counts; names of the datasets that are there already.

    Labels and genes are looked at in the first dataset that would be ingested; the others have the same columns.
    """
    held = {record.name for record in opening.open_store(store).datasets} if opening.exists(store) else set()
    there, is_checked = [], False
    for part in found.datasets:
        if part.dataset_id not in held and is_checked:
            continue
        with found.source(part) as source:
            if _is_there(store, part.dataset_id, source):
                there.append(part.dataset_id)
            else:
                job = Job(source=source, dataset=part.dataset_id, options=options, derived=_CENSUS_DERIVED)
                check(job, join(store))
                is_checked = True
    return there


def _is_there(store: str | Path, name: str, source: Source) -> bool:
    """Whether a store holds this slice under this name already."""
    if not opening.exists(store):
        return False
    hashes = {record.name: record.content_sha256 for record in opening.open_store(store).datasets}
    return name in hashes and hashes[name] == source.content_sha256()


def _source_type(kind: str) -> type[Any]:
    """The class of a kind of source that is a file or a folder, imported when it is asked for."""
    match kind:
        case "h5ad":
            from txfm_data.sources.h5ad import H5adSource as Chosen
        case "10x":
            from txfm_data.sources.tenx import TenxSource as Chosen  # type: ignore[assignment]
        case "gct":
            from txfm_data.sources.gct import GctSource as Chosen  # type: ignore[assignment]
        case "star":
            from txfm_data.sources.star import StarSource as Chosen  # type: ignore[assignment]
        case "table":
            from txfm_data.sources.table import TableSource as Chosen  # type: ignore[assignment]
        case _:
            raise ValueError(f"no kind of source {kind!r}; {did_you_mean(kind, SOURCE_KINDS)}")
    return Chosen


SOURCE_KINDS = ("h5ad", "10x", "gct", "star", "table")
BULK_KINDS = ("gct", "star", "table")
"""Those that hold bulk profiles unless somebody says otherwise."""
_OPTIONS = tuple(field.name for field in fields(IngestOptions))


def source_options(kind: str) -> dict[str, inspect.Parameter]:
    """Options of one kind of source besides its path and the fields of `IngestOptions`; ValueError if there is no such kind."""
    parameters = list(inspect.signature(_source_type(kind)).parameters.items())[1:]
    return {name: parameter for name, parameter in parameters if not name.startswith(("_", "spool"))}


def many(
    sources: Sequence[Mapping[str, Any]],
    store: str | Path,
    *,
    dry_run: bool = False,
    progress: Progress = ignore,
    **options: Any,
) -> dict[str, Any]:
    """Ingest several sources, of one kind or of several, as one dataset each: all of them or none, side by side.

    Parameters
    ----------
    sources
        For each its ``kind``, ``dataset`` and ``path``, and whatever else `h5ad`, `tenx`, … take.
    dry_run
        Write nothing; return what would be read, written and needed.
    progress
        Called with samples done of all.
    **options
        Fields of `IngestOptions` for every source that does not say otherwise.

    Returns
    -------
    dict
        store, datasets (as `ingest.run.ingest_sources`, or `ingest.run.describe` for a dry run), n_obs.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        If a source or the store cannot be used as asked; the store is as before then.
    """
    if not sources:
        raise ValueError("no source is named; name at least one, with its kind, dataset and path")
    with ExitStack() as opened:
        jobs = [_job(dict(entry), at, options, opened) for at, entry in enumerate(sources)]
        if dry_run:
            described = [describe(job, join(store)) for job in jobs]
            return {
                "store": join(store),
                "dry_run": True,
                "datasets": described,
                "n_obs": sum(d["n_obs"] for d in described),
            }
        found = ingest_sources(jobs, join(store), progress=progress)
    return {"store": join(store), "datasets": found, "n_obs": sum(d["n_obs"] for d in found)}


def _job(entry: dict[str, Any], at: int, common: dict[str, Any], opened: ExitStack) -> Job:
    """Open one entry of a list of sources."""
    missing = [name for name in ("kind", "dataset", "path") if name not in entry]
    if missing:
        raise ValueError(f"source {at + 1} of the list has no {missing[0]!r}; each needs a kind, a dataset and a path")
    kind, dataset, path = str(entry.pop("kind")), str(entry.pop("dataset")), entry.pop("path")
    known = source_options(kind)
    wrong = [name for name in entry if name not in known and name not in _OPTIONS]
    if wrong:
        raise ValueError(
            f"source {dataset!r} of the list: no option {wrong[0]!r}; {did_you_mean(wrong[0], (*known, *_OPTIONS))}"
        )
    given = {name: entry.pop(name) for name in list(entry) if name in known}
    defaults = {"modality": "bulk"} if kind in BULK_KINDS else {}
    source = opened.enter_context(_source_type(kind)(join(path), **given))
    return Job(source=source, dataset=dataset, options=IngestOptions(**defaults | common | entry))
