"""Ingests and curates a corpus into a folder, as far as that is not done: what is finished and was asked for alike is kept.

A build can be stopped at any moment. Datasets are committed to the store one by one, a selection appears whole; before each step
its inputs are written down, so that a later build knows what an existing result was made from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from txfm_data import ingest
from txfm_data.corpora.entries import CENSUS, PATH_OPTIONS
from txfm_data.corpora.plan import file_states, missing_text, needed_files
from txfm_data.corpora.recipe import Corpus, CorpusDataset
from txfm_data.corpora.steps import Steps, difference
from txfm_data.curate.embedding import check_checkpoint, fingerprint_of
from txfm_data.curate.recipe import Genes, Phenoprints, Recipe, Rule
from txfm_data.curate.run import CurateOptions, curate
from txfm_data.ingest.options import IngestOptions
from txfm_data.parallel import Workers
from txfm_data.progress import Progress
from txfm_data.selection import SELECTION
from txfm_data.sources.hashing import file_sha256
from txfm_data.store.opening import exists, open_store

STORE, SELECTED, SHARDS = "store.soma", "selection", "corpus.shards"
"""What a build leaves in its folder, beside what each was made from: store, selection, shards (`txfm shard` writes them)."""
OtherFiles = dict[str, dict[str, str]]
"""By dataset and place of the file: how it is not the stated one."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a corpus is built.

    sources : folder below which all source files lie; None if no dataset is read from a file.
    out : folder of the build; made if there is none.
    workers : where blocks are worked on, and the memory of all of it.
    allow_missing : build without the datasets whose files are missing.
    accept_other_files : take files whose size is not the stated one.  checksums : compute stated checksums before reading.
    rebuild : replace a selection (and shards) that was made from something else.
    census_uri : copy of a Census release to read in place of the service.
    """

    sources: Path | None
    out: Path
    workers: Workers = Workers()
    allow_missing: bool = False
    accept_other_files: bool = False
    checksums: bool = False
    rebuild: bool = False
    census_uri: str | None = None


def store_path(out: Path) -> Path:
    """Store of a build."""
    return out / STORE


def check_build(corpus: Corpus, options: BuildOptions) -> None:
    """Refuse, before anything is read, what ingests and curation would refuse whatever the data are.

    Raises
    ------
    ValueError, FileNotFoundError
        If the memory is too small, a rule names a file or a checkpoint that is not there, or no folder of sources is named.
    """
    IngestOptions(workers=options.workers)
    for number, rule in enumerate(corpus.curation.rules, start=1):
        try:
            _check_files(rule)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"rule {number} ({rule.name}): {error}") from error
    files = [file.path for dataset in corpus.datasets for file in needed_files(dataset)]
    if options.sources is None and files:
        raise ValueError(
            f"corpus {corpus.name} is read from files ({', '.join(files[:3])}{', …' if len(files) > 3 else ''}); name their folder "
            "with --sources"
        )


def _check_files(rule: Rule) -> None:
    if isinstance(rule, Genes):
        for path in filter(None, (rule.keep, rule.drop)):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such file; give a text file of Ensembl gene ids, one a line")
    elif isinstance(rule, Phenoprints) and rule.embedding.kind == "checkpoint" and rule.embedding.path is not None:
        check_checkpoint(rule.embedding.path)


def buildable(corpus: Corpus, options: BuildOptions, progress: Progress) -> tuple[Corpus, list[str], OtherFiles]:
    """The corpus without what is missing, if that may be; names of what is left out; and how files are other.

    Datasets that the store holds need no files any more.

    Raises
    ------
    FileNotFoundError, ValueError
        If files are missing, or are not the stated ones; all of them are named.
    """
    held = _held(options.out)
    states = [
        state
        for dataset in corpus.datasets
        if dataset.name not in held
        for state in file_states(dataset, options.sources, checksums=options.checksums, progress=progress)
    ]
    problems: OtherFiles = {}
    for state in states:
        if state.state == "other":
            problems.setdefault(state.dataset, {})[str(state.place)] = state.problem
    if problems and not options.accept_other_files:
        told = "; ".join(": ".join(item) for found in problems.values() for item in found.items())
        raise ValueError(f"{told}; get the file again, or pass --accept-other-files if another release of it is meant")
    missing = [state for state in states if state.state == "missing"]
    if missing and not options.allow_missing:
        raise FileNotFoundError(
            f"{options.sources}: source files are missing: {missing_text(corpus, missing)}. `txfm corpus plan` says where to "
            "get them; pass --allow-missing to build without these datasets"
        )
    without = sorted({state.dataset for state in missing})
    left = [dataset.name for dataset in corpus.datasets if dataset.name not in without]
    if not left:
        raise FileNotFoundError(
            f"{options.sources}: no dataset of {corpus.name} is there; `txfm corpus plan` says what to get"
        )
    problems = {name: found for name, found in problems.items() if name not in without}
    return corpus.only(left) if without else corpus, without, problems


def _held(out: Path) -> set[str]:
    path = store_path(out)
    return {record.name for record in open_store(path).datasets} if exists(path) else set()


def ingest_corpus(
    corpus: Corpus,
    options: BuildOptions,
    steps: Steps,
    *,
    other: Mapping[str, Mapping[str, str]],
    progress: Callable[[str], Progress],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Ingest the datasets that the store has not got, one after the other, each all or nothing.

    Those whose genes have no Ensembl ids and no gene map come last: they are matched by the symbols of the others.

    other : of `buildable`.

    Returns
    -------
    tuple of str
        Names that the datasets of the corpus have in the store; of the Census those of its datasets.

    Raises
    ------
    ValueError, FileNotFoundError, TypeError
        If a source cannot be ingested as the corpus says, or the store holds a dataset that was ingested otherwise.
    """
    store, names = store_path(options.out), []
    for dataset in sorted(corpus.datasets, key=_needs_symbols):
        entry, step, held = _entry(dataset, options), f"ingest {dataset.name}", _held(options.out)
        is_held = dataset.name in held
        if dataset.kind == CENSUS:  # what the store holds besides the datasets of other sources
            is_held = any(steps.inputs(f"ingest {name}") is None for name in held)
        if is_held and steps.inputs(step) not in (None, entry):
            raise ValueError(
                f"{store}: dataset {dataset.name!r} was ingested otherwise ({difference(steps.inputs(step), entry)}); a store "
                "keeps what it holds: name another --out"
            )
        if dataset.name in held:
            say(f"{dataset.name}: in the store already")
            names.append(dataset.name)
            continue
        steps.took(dataset.name, other.get(dataset.name, {}))
        steps.intend(step, entry)
        ingested, there = _ingest(dataset, options, store, progress(f"ingesting {dataset.name}"))
        for found in ingested:
            say(
                f"{found['dataset']}: {found['n_obs']:,} samples, {found['genes_matched']:,} of {found['genes_in_file']:,} genes"
            )
        names += [*there, *(found["dataset"] for found in ingested)]
    return tuple(names)


def _entry(dataset: CorpusDataset, options: BuildOptions) -> dict[str, Any]:
    """What the ingest of a dataset is made from."""
    entry = {key: value for key, value in dataset.ingest.items() if value is not None}
    is_copy = dataset.kind == CENSUS and options.census_uri is not None
    return entry | ({"census": options.census_uri} if is_copy else {})


def _needs_symbols(dataset: CorpusDataset) -> bool:
    return dataset.gene_ids == "symbol" and dataset.ingest.get("gene_map") is None


def _ingest(
    dataset: CorpusDataset, options: BuildOptions, store: Path, progress: Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """Ingest one dataset; what was ingested, and names of what was there already."""
    entry = {key: value for key, value in dataset.ingest.items() if value is not None}
    for key in PATH_OPTIONS:
        if key in entry and options.sources is not None:
            entry[key] = str(options.sources / entry[key])
    for key in ("obs_columns", "skip_columns"):
        if key in entry:
            entry[key] = tuple(entry[key])
    if dataset.kind != CENSUS:
        result = ingest.many([entry | {"dataset": dataset.name}], store, workers=options.workers, progress=progress)
        return list(result["datasets"]), []
    del entry["kind"]
    if options.census_uri is not None:
        entry |= {"uri": options.census_uri, "version": None}
    result = ingest.census(store, **entry, workers=options.workers, progress=progress)
    return list(result["datasets"]), list(result["there_already"])


def select_corpus(
    corpus: Corpus, names: tuple[str, ...], options: BuildOptions, steps: Steps, curating: CurateOptions
) -> bool:
    """Curate some datasets of the store into a selection, unless that is done; whether it was done now.

    names : of `ingest_corpus`; a curation that names datasets takes those of them.

    Raises
    ------
    FileExistsError
        If there is a selection made from something else, and `rebuild` is not asked for.
    ValueError
        If a rule does not fit the store, or the curation takes none of the datasets; an older selection stays then.
    """
    store, out, taken = store_path(options.out), options.out / SELECTED, corpus.curation.datasets
    records = [record for record in open_store(store).datasets if record.name in names]
    records = [record for record in records if taken is None or record.name in taken]
    if not records:
        raise ValueError(
            f"{store}: the curation takes the datasets {', '.join(taken or ())} alone, but those built are {', '.join(names)}; "
            "change datasets in the recipe"
        )
    rules = replace(corpus.curation, datasets=tuple(record.name for record in records))
    inputs = _selection_inputs(rules) | {
        "datasets": {record.name: [record.content_sha256, record.obs_start, record.n_obs] for record in records},
    }
    if steps.is_made("selection", inputs, out, SELECTION, rebuild=options.rebuild):
        curating.say("selection: made from the same before, kept")
        return False
    if (out / SELECTION).is_file():  # nothing is put aside for what would be refused
        curate(store, rules, out.with_name(f".{out.name}.new"), curating, dry_run=True)
    with steps.making("selection", inputs, out, SELECTION):
        curate(store, rules, out, curating)
    return True


def _selection_inputs(rules: Recipe) -> dict[str, Any]:
    """Seed and rules, with the contents of the files and checkpoints that they name in place of the paths."""
    trees = []
    for rule, tree in zip(rules.rules, rules.tree()["rules"], strict=True):
        if isinstance(rule, Genes):
            tree |= {key: file_sha256(tree[key]) for key in ("keep", "drop") if tree[key] is not None}
        elif isinstance(rule, Phenoprints) and (found := fingerprint_of(rule.embedding)):
            tree["embedding"] |= {"path": found}
        trees.append(tree)
    return {"rules": trees, "seed": rules.seed}
