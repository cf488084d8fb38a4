"""Ingests and curates a corpus into a folder, as far as that is not done: what is finished and was asked for alike is kept.

A build can be stopped at any moment. Datasets are committed to the store one by one, a selection appears whole; before each step
its inputs are written down, so that a later build knows what an existing result was made from.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from txfm_data import ingest
from txfm_data.corpora.plan import file_states, missing_text
from txfm_data.corpora.recipe import CENSUS, PATH_OPTIONS, Corpus, CorpusDataset
from txfm_data.curate.run import CurateOptions, curate
from txfm_data.parallel import Workers
from txfm_data.progress import Progress
from txfm_data.selection import SELECTION
from txfm_data.store.opening import exists, open_store

STORE, SELECTED, SHARDS, STEPS = "store.soma", "selection", "corpus.shards", "steps.json"
"""What a build leaves in its folder: store, selection, shards (`txfm shard` writes them), and what each was made from."""
_FORMAT, _VERSION = "txfm-corpus-build", 1
_OTHER_FILES = "other files"


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a corpus is built.

    sources : folder below which all source files lie.  out : folder of the build; made if there is none.
    workers : where blocks are worked on, and the memory of all of it.
    allow_missing : build without the datasets whose files are missing.
    accept_other_files : take files whose size is not the stated one.  checksums : compute stated checksums before reading.
    rebuild : replace a selection (and shards) that was made from something else.
    census_uri : copy of a Census release to read in place of the service.
    """

    sources: Path
    out: Path
    workers: Workers = Workers()
    allow_missing: bool = False
    accept_other_files: bool = False
    checksums: bool = False
    rebuild: bool = False
    census_uri: str | None = None


class Steps:
    """What the steps of a build were made from: a small JSON file in its folder, replaced whole.

    Raises
    ------
    ValueError
        If the folder holds something else, or the build of another corpus.
    """

    def __init__(self, out: Path, corpus: str) -> None:
        self._path = out / STEPS
        if out.exists() and not self._path.is_file() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out}: holds something that is no build of a corpus; name another --out")
        out.mkdir(parents=True, exist_ok=True)
        self._steps: dict[str, Any] = {}
        if self._path.is_file():
            self._steps = self._read(corpus)
        else:
            self._write(corpus)
        self._corpus = corpus

    def _read(self, corpus: str) -> dict[str, Any]:
        try:
            tree = json.loads(self._path.read_text(encoding="utf-8"))
            if tree["format"] != _FORMAT or tree["version"] != _VERSION:
                raise ValueError(f"format {tree['format']!r}, version {tree['version']!r}")
            found, steps = str(tree["corpus"]), dict(tree["steps"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._path}: not the steps of a build ({error}); remove the folder, or name another --out"
            ) from error
        if found != corpus:
            raise ValueError(
                f"{self._path.parent}: holds the build of corpus {found!r}, not of {corpus!r}; name another --out"
            )
        return steps

    def _write(self, corpus: str) -> None:
        tree = {"format": _FORMAT, "version": _VERSION, "corpus": corpus, "steps": self._steps}
        part = self._path.with_name(f".{self._path.name}.tmp")
        with part.open("w", encoding="utf-8") as handle:
            handle.write(json.dumps(tree, indent=1, sort_keys=True) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, self._path)

    def inputs(self, step: str) -> Any:
        """What a step was last made from, or None."""
        return self._steps.get(step)

    def intend(self, step: str, inputs: Any) -> None:
        """Write down what a step is about to be made from."""
        self._steps[step] = inputs
        self._write(self._corpus)

    def taken_otherwise(self, problems: Mapping[str, str]) -> dict[str, str]:
        """Write down files that are taken though they are not the stated ones; all such of this build, by place."""
        known = dict(self.inputs(_OTHER_FILES) or {})
        if problems.keys() - known.keys():
            self.intend(_OTHER_FILES, known | dict(problems))
        return known | dict(problems)

    def must_run(self, step: str, inputs: Mapping[str, Any], result: Path, mark: str, *, rebuild: bool) -> bool:
        """Whether a step has to run; if so its inputs are written down, and an older result is gone.

        result : folder that the step makes, whole.  mark : file in it once it is finished.

        Raises
        ------
        FileExistsError
            If the result was made from something else and `rebuild` is not asked for.
        """
        given = json.loads(json.dumps(inputs))
        # Renamed before it is removed: a build that is killed meanwhile leaves no half of it behind
        old = result.with_name(f".{result.name}.old")
        if (result / mark).is_file():
            before = self.inputs(step)
            if before == given:
                return False
            if not rebuild:
                raise FileExistsError(
                    f"{result}: was made from something else ({_difference(before, given)}); pass --rebuild to replace it, or name "
                    "another --out"
                )
            os.rename(result, old)
        shutil.rmtree(old, ignore_errors=True)
        self.intend(step, given)
        return True


def _difference(before: Any, after: Any) -> str:
    if not isinstance(before, Mapping):
        return "nothing was written down about it"
    return "other " + ", ".join(sorted(key for key in {*before, *after} if before.get(key) != after.get(key)))


def store_path(out: Path) -> Path:
    """Store of a build."""
    return out / STORE


def buildable(corpus: Corpus, options: BuildOptions, progress: Progress) -> tuple[Corpus, list[str], dict[str, str]]:
    """The corpus without what is missing, if that may be; names of what is left out; and by place, how files are other.

    Datasets that the store holds need no files any more.

    Raises
    ------
    FileNotFoundError, ValueError
        If files are missing, or are not the stated ones; all of them are named.
    """
    held = _held(options.out)
    waiting = [dataset for dataset in corpus.datasets if dataset.name not in held and dataset.kind != CENSUS]
    states = [
        state
        for dataset in waiting
        for state in file_states(dataset, options.sources, checksums=options.checksums, progress=progress)
    ]
    other = [state for state in states if state.state == "other"]
    problems = {str(state.place): state.problem for state in other}
    if other and not options.accept_other_files:
        told = "; ".join(map(": ".join, problems.items()))
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
    return corpus.only(left) if without else corpus, without, problems


def _held(out: Path) -> set[str]:
    path = store_path(out)
    return {record.name for record in open_store(path).datasets} if exists(path) else set()


def ingest_corpus(
    corpus: Corpus,
    options: BuildOptions,
    steps: Steps,
    *,
    progress: Callable[[str], Progress],
    say: Callable[[str], None],
) -> None:
    """Ingest the datasets that the store has not got, one after the other, each all or nothing.

    Those whose genes have no Ensembl ids and no gene map come last: they are matched by the symbols of the others.

    Raises
    ------
    ValueError, FileNotFoundError, TypeError
        If a source cannot be ingested as the corpus says, or the store holds a dataset that was ingested otherwise.
    """
    store, held = store_path(options.out), _held(options.out)
    for dataset in sorted(corpus.datasets, key=_needs_symbols):
        entry = {key: value for key, value in dataset.ingest.items() if value is not None}
        step = f"ingest {dataset.name}"
        if steps.inputs(step) not in (None, entry) and (dataset.name in held or dataset.kind == CENSUS):
            raise ValueError(
                f"{store}: dataset {dataset.name!r} was ingested otherwise ({_difference(steps.inputs(step), entry)}); a store "
                "keeps what it holds: name another --out"
            )
        if dataset.name in held:
            say(f"{dataset.name}: in the store already")
            continue
        steps.intend(step, entry)
        for found in _ingest(dataset, options, store, progress(f"ingesting {dataset.name}")):
            say(
                f"{found['dataset']}: {found['n_obs']:,} samples, {found['genes_matched']:,} of {found['genes_in_file']:,} genes"
            )


def _needs_symbols(dataset: CorpusDataset) -> bool:
    return dataset.gene_ids == "symbol" and dataset.ingest.get("gene_map") is None


def _ingest(dataset: CorpusDataset, options: BuildOptions, store: Path, progress: Progress) -> list[dict[str, Any]]:
    """Ingest one dataset; what was ingested."""
    entry = dict(dataset.ingest)
    for key in PATH_OPTIONS:
        if entry.get(key) is not None:
            entry[key] = str(options.sources / entry[key])
    for key in ("obs_columns", "skip_columns"):
        if entry.get(key) is not None:
            entry[key] = tuple(entry[key])
    if dataset.kind != CENSUS:
        result = ingest.many([entry | {"dataset": dataset.name}], store, workers=options.workers, progress=progress)
        return list(result["datasets"])
    del entry["kind"]
    if options.census_uri is not None:
        entry |= {"uri": options.census_uri, "version": None}
    result = ingest.census(store, **entry, workers=options.workers, progress=progress)
    return list(result["datasets"])


def select_corpus(corpus: Corpus, options: BuildOptions, steps: Steps, curating: CurateOptions) -> bool:
    """Curate the store into a selection, unless that is done; whether it was done now.

    Raises
    ------
    FileExistsError
        If there is a selection made from something else, and `rebuild` is not asked for.
    ValueError
        If a rule does not fit the store.
    """
    store, out = store_path(options.out), options.out / SELECTED
    rules, records = corpus.curation, open_store(store).datasets
    if not corpus.is_census:
        wanted = {dataset.name for dataset in corpus.datasets}
        rules = replace(rules, datasets=tuple(record.name for record in records if record.name in wanted))
    inputs = {
        "rules": [_rule_inputs(rule) for rule in rules.tree()["rules"]], "seed": rules.seed,
        "datasets": {record.name: [record.content_sha256, record.obs_start, record.n_obs] for record in records},
    }  # fmt: skip
    if not steps.must_run("selection", inputs, out, SELECTION, rebuild=options.rebuild):
        curating.say("selection: made from the same before, kept")
        return False
    curate(store, rules, out, curating)
    return True


def _rule_inputs(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule, with the contents of the checkpoint or file that it names in place of its path."""
    embedding = rule.get("embedding")
    if embedding is None or embedding.get("path") is None:
        return rule
    return rule | {"embedding": embedding | {"path": contents(embedding["path"])}}


def contents(path: str) -> str:
    """What tells one checkpoint or file of embeddings from another: the sha256 of it; of a name on a hub, the name."""
    place = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    if not place.is_file():
        return path
    with place.open("rb") as handle:
        return f"sha256 {hashlib.file_digest(handle, 'sha256').hexdigest()}"
