"""Plan and build a corpus that a file describes: sources, curation, shards, and what was expected."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_kinds, run_verb, to_jsonable
from tools.sizes import parse_size

if TYPE_CHECKING:
    from shards.select import ShardConfig
    from txfm_data.corpora.build import BuildOptions
    from txfm_data.corpora.recipe import Corpus
    from txfm_data.corpora.steps import Steps


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Name the corpora that are described in configs/corpora."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Say what a corpus needs from where, what of it is there, what is not verified, and what a build would take."""

    name: str
    """A corpus (txfm corpus list), or a YAML file of one."""
    sources: Path | None = None
    """Folder below which the source files lie. Default: nothing is looked for."""
    datasets: tuple[str, ...] = ()
    """Names of the datasets to plan. Default: all."""
    checksums: bool = False
    """Compute the checksums that the corpus file states; reads those files whole."""


@dataclass(frozen=True, kw_only=True)
class BuildCorpusOptions:
    """Ingest the datasets of a corpus, curate them, build shards, and compare the result with what was expected.

    OUT holds store.soma, selection, corpus.shards, report.json and report.txt. A build that was stopped, in whatever way, goes on
    where it was with the same command; what is finished is kept.
    """

    name: str
    """A corpus (txfm corpus list), or a YAML file of one."""
    out: Path
    """Folder of the build on this machine."""
    sources: Path | None = None
    """Folder below which the source files lie, named as `txfm corpus plan` says; not needed where none is read."""
    datasets: tuple[str, ...] = ()
    """Names of the datasets to build. Default: all."""
    curation: Path | None = None
    """YAML recipe of rules to apply in place of the corpus' own, for example with smaller thresholds for a part of the data."""
    model: str | None = None
    """Checkpoint that embeds cells for phenoprint rules which name none: a folder, or a model on the Hugging Face hub."""
    device: str | None = None
    """Where that model computes, such as cpu or cuda. Default: cuda if there is one."""
    census: str | None = None
    """Copy of a Census release, or another collection of that shape, to read in place of the release over the network."""
    allow_missing: bool = False
    """Build without the datasets whose source files are missing; the report names them."""
    accept_other_files: bool = False
    """Take source files whose size or checksum is not the one that the corpus file states; the report names them."""
    checksums: bool = False
    """Compute the checksums that the corpus file states before anything is ingested."""
    rebuild: bool = False
    """Replace a selection and shards that were made from another recipe, other datasets or another model; the old ones stay
    until the new ones are there."""
    workers: int = 0
    """Processes on this machine that read and write; 0 works in this process, without Dask."""
    dask_scheduler: str | None = None
    """Address of a Dask scheduler (tcp://host:8786) whose workers see the same files, in place of --workers."""
    memory_budget: str = "2GiB"
    """Memory for all of it, such as 2GiB."""
    scratch: Path | None = None
    """Folder for what is needed meanwhile. Default: beside the results."""


def run_list(options: ListOptions, terminal: Terminal) -> dict[str, Any]:
    """Name the corpora."""
    from txfm_data.corpora.recipe import FOLDER, corpus_names, read_corpus

    corpora = [read_corpus(name) for name in corpus_names()]
    return {
        "folder": str(FOLDER),
        "corpora": [
            {
                "name": corpus.name, "title": corpus.title, "n_datasets": len(corpus.datasets),
                "samples_expected": corpus.expected.samples, "genes_expected": corpus.expected.genes,
            }
            for corpus in corpora
        ],
    }  # fmt: skip


def run_plan(options: PlanOptions, terminal: Terminal) -> dict[str, Any]:
    """Plan a corpus."""
    from txfm_data.corpora.plan import plan_corpus
    from txfm_data.corpora.recipe import read_corpus

    corpus = read_corpus(options.name)
    corpus = (corpus.only(options.datasets) if options.datasets else corpus).taken()
    progress = terminal.progress("checksums", "bytes")
    return plan_corpus(corpus, options.sources, checksums=options.checksums, progress=progress)


def run_build(options: BuildCorpusOptions, terminal: Terminal) -> dict[str, Any]:
    """Build a corpus."""
    from tools.curate import embedder
    from txfm_data.corpora.build import buildable, check_build, ingest_corpus, select_corpus
    from txfm_data.corpora.steps import Steps
    from txfm_data.curate.run import CurateOptions

    whole, corpus, building = _asked(options)
    curating = CurateOptions(
        workers=building.workers, embed=embedder(options.device), scratch=options.scratch, progress=terminal.progress,
        say=terminal.say,
    )  # fmt: skip
    sharding = _shard_config(corpus, options.out)
    check_build(corpus, building)
    corpus, missing, other = buildable(corpus, building, terminal.progress("checksums", "bytes"))
    steps = Steps(options.out, corpus.name)
    taken = [f"other file than stated: {place} {told}" for found in other.values() for place, told in found.items()]
    for text in (*(f"left out, no source files: {name}" for name in missing), *taken):
        terminal.say(f"WARNING: {text}")
    names = ingest_corpus(
        corpus, building, steps, other=other, progress=lambda label: terminal.progress(label, "samples"), say=terminal.say
    )  # fmt: skip
    select_corpus(corpus, names, building, steps, curating)
    shards = _shard(sharding, building, steps, options.scratch, terminal)
    other_files = steps.other_files([dataset.name for dataset in corpus.datasets])
    found = {"missing": missing, "other_files": other_files, "shards": shards}
    report = _report(whole, corpus, building, found)
    for text in report["warnings"]:
        terminal.say(f"WARNING: {text}")
    return report


def _asked(options: BuildCorpusOptions) -> "tuple[Corpus, Corpus, BuildOptions]":
    """The corpus with the curation of the command line, the part of it that is asked for, and how to build it."""
    from txfm_data.corpora.build import BuildOptions
    from txfm_data.corpora.recipe import read_corpus
    from txfm_data.curate.recipe import read_recipe, with_model
    from txfm_data.parallel import Workers

    corpus = read_corpus(options.name)
    if options.curation is not None:
        corpus = corpus.with_curation(read_recipe(options.curation))
    part = (corpus.only(options.datasets) if options.datasets else corpus).taken()
    part = part.with_curation(with_model(part.curation, options.model))
    building = BuildOptions(
        sources=options.sources, out=options.out, allow_missing=options.allow_missing, checksums=options.checksums,
        accept_other_files=options.accept_other_files, rebuild=options.rebuild, census_uri=options.census,
        workers=Workers(n=options.workers, scheduler=options.dask_scheduler, memory=parse_size(options.memory_budget)),
    )  # fmt: skip
    return corpus.only(options.datasets) if options.datasets else corpus, part, building


_OWN = ("store", "out", "selection", "workers", "dask_scheduler", "memory_budget", "scratch", "dry_run")


def _shard_config(corpus: "Corpus", out: Path) -> "ShardConfig":
    """How the shards of a corpus are made, checked as far as it can be without a store."""
    from tools import shard
    from txfm_data.config_tree import from_tree
    from txfm_data.corpora.build import SELECTED

    for key in _OWN:
        if key in corpus.shard:
            raise ValueError(f"corpus {corpus.name}: shard sets {key}, which the build chooses; leave it out")
    tree = {**corpus.shard, "store": "", "out": "", "selection": str(out / SELECTED)}
    asked = from_tree(shard.Options, tree, f"corpus {corpus.name}: shard")
    try:
        return shard.config_of(asked)
    except ValueError as error:
        raise ValueError(f"corpus {corpus.name}: shard: {error}") from error


def _shard(
    config: "ShardConfig", building: "BuildOptions", steps: "Steps", scratch: Path | None, terminal: Terminal
) -> dict[str, Any]:
    """Build the shards, unless that is done; what they hold."""
    from shards.describe import describe
    from shards.manifest import MANIFEST, Corpus
    from shards.writer import build_shards, plan_shards
    from txfm_data.corpora.build import SELECTED, SHARDS, store_path
    from txfm_data.selection import read_selection
    from txfm_data.store.opening import open_store

    store, out = open_store(store_path(building.out)), building.out / SHARDS
    chosen = read_selection(building.out / SELECTED, store)
    inputs = vars(config) | {"weights": dict(config.weights), "selection": chosen.sha256}
    if steps.is_made("shards", inputs, out, MANIFEST, rebuild=building.rebuild):
        terminal.say("shards: made from the same before, kept")
    else:
        if (out / MANIFEST).is_file():  # nothing is put aside for what would be refused
            free = out.with_name(f".{out.name}.new")
            plan_shards(store, free, config, workers=building.workers, scratch=scratch)
        with steps.making("shards", inputs, out, MANIFEST):
            progress = terminal.progress("reading, then writing")
            build_shards(store, out, config, workers=building.workers, scratch=scratch, progress=progress)
    found = describe(Corpus(out))
    keys = ("path", "n_train", "n_val", "n_genes", "shards", "bytes", "fingerprint", "datasets")
    return {key: found[key] for key in keys}


def _report(whole: "Corpus", corpus: "Corpus", building: "BuildOptions", more: dict[str, Any]) -> dict[str, Any]:
    """Compare, and write report.json and report.txt into the folder of the build."""
    from txfm_data.corpora.build import SELECTED, STORE
    from txfm_data.corpora.report import compare, report_text

    built = [dataset.name for dataset in corpus.datasets]
    n_val = {dataset["name"]: dataset["n_val"] for dataset in more["shards"].pop("datasets")}
    found = compare(whole, building.out / STORE, building.out / SELECTED, built=built, n_val=n_val)
    report = found | more | {"out": str(building.out)}
    text = report_text(report)
    for name, content in (("report.json", json.dumps(to_jsonable(report), indent=1) + "\n"), ("report.txt", text)):
        part = building.out / f".{name}.tmp"
        part.write_text(content, encoding="utf-8")
        os.replace(part, building.out / name)
    return report | {"text": text}


def list_summary(result: dict[str, Any]) -> str:
    """One line a corpus; where there is none, the folder that was looked in."""
    if not result["corpora"]:
        return (
            f"no corpora in {result['folder']}: an installed package brings none. `txfm corpus plan` and `txfm corpus build` take "
            "the path of a YAML file"
        )
    width = max((len(corpus["name"]) for corpus in result["corpora"]), default=0)
    return "\n".join(f"{corpus['name']:<{width}}  {corpus['title']}" for corpus in result["corpora"])


def plan_summary(result: dict[str, Any]) -> str:
    """The plan as text."""
    from txfm_data.corpora.plan import plan_text

    return plan_text(result)


def build_summary(result: dict[str, Any]) -> str:
    """The report, and where the shards are."""
    shards = result["shards"]
    return (
        f"{result['text']}shards: {shards['path']} ({shards['n_train']:,} train and {shards['n_val']:,} validation samples, "
        f"{shards['n_genes']:,} genes)\nreport: {result['out']}/report.txt"
    )


def main_list(argv: Sequence[str] | None = None) -> int:
    """Name the corpora that are described in configs/corpora."""
    return run_verb("corpus list", ListOptions, run_list, list_summary, argv)


def main_plan(argv: Sequence[str] | None = None) -> int:
    """Say what a corpus needs from where, and what of it is there."""
    return run_verb("corpus plan", PlanOptions, run_plan, plan_summary, argv, positionals=("name",))


def main_build(argv: Sequence[str] | None = None) -> int:
    """Ingest, curate and shard a corpus, and compare it with what was expected."""
    return run_verb("corpus build", BuildCorpusOptions, run_build, build_summary, argv, positionals=("name",))


KINDS = {"list": main_list, "plan": main_plan, "build": main_build}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one kind of corpus."""
    return run_kinds("corpus", KINDS, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
