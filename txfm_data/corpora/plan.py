"""What a corpus needs: files to have, which of them are there, what is known about them, and what a build would take."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from txfm_data.corpora.entries import PATH_OPTIONS
from txfm_data.corpora.recipe import IDENTITY, Corpus, CorpusDataset, SourceFile
from txfm_data.progress import Progress, ignore

State = Literal["there", "missing", "other"]
_HASH_BYTES = 2**22
_BYTES_A_VALUE = 1.2
"""Of a store, per count above zero; as `txfm ingest --dry-run` estimates it."""
_BYTES_A_VALUE_SHARDED = 0.9
_VALUES_A_CELL, _SHARE_OF_GENES_BULK, _GENES_BULK = 3_000, 0.6, 20_000
"""Counts above zero that an estimate assumes: of a single cell, and as a share of the genes of a bulk profile, and how many
genes that has where nobody states it."""


@dataclass(frozen=True, kw_only=True)
class FileState:
    """One file of a source and what is at its place.

    state : "there", "missing", as an empty folder is too, or "other", if size or checksum are not the stated ones.
    found_bytes : None for a folder.
    problem : what is other.
    """

    dataset: str
    file: SourceFile
    place: Path
    state: State
    found_bytes: int | None = None
    problem: str = ""


def needed_files(dataset: CorpusDataset) -> tuple[SourceFile, ...]:
    """Files of a dataset: those that its source states, and those that only its ingest names."""
    stated = {file.path for file in dataset.source.files}
    named = [(key, dataset.ingest[key]) for key in PATH_OPTIONS if dataset.ingest.get(key) is not None]
    more = tuple(
        SourceFile(path=path, what=f"{key.replace('_', ' ')} of the ingest")
        for key, path in named
        if not any(path == file or file.startswith(f"{path}/") for file in stated)
    )
    return (*dataset.source.files, *more)


def file_states(
    dataset: CorpusDataset, sources: Path | None, *, checksums: bool = False, progress: Progress = ignore
) -> list[FileState]:
    """Look at the files of a dataset.

    sources : folder of all sources; None if there is none yet.
    checksums : compute those that are stated, which reads the files whole.  progress : of the bytes read.
    """
    states = []
    for file in needed_files(dataset):
        place = Path(file.path) if sources is None else sources / file.path
        if sources is None or not place.exists() or (place.is_dir() and not any(place.iterdir())):
            states.append(FileState(dataset=dataset.name, file=file, place=place, state="missing"))
            continue
        size = place.stat().st_size if place.is_file() else None
        problem = _size_problem(file, size)
        if checksums and not problem and size is not None:
            problem = _checksum_problem(file, place, progress)
        state: State = "other" if problem else "there"
        states.append(
            FileState(dataset=dataset.name, file=file, place=place, state=state, found_bytes=size, problem=problem)
        )
    return states


def _size_problem(file: SourceFile, size: int | None) -> str:
    if file.bytes is None or size == file.bytes:
        return ""
    return "is a folder, expected a file" if size is None else f"has {size:,} bytes, expected {file.bytes:,}"


def _checksum_problem(file: SourceFile, place: Path, progress: Progress) -> str:
    for name in ("sha256", "md5"):
        expected = getattr(file, name)
        if expected is None:
            continue
        found = _digest(place, name, progress)
        if found != expected:
            return f"has {name} {found}, expected {expected}"
    return ""


def _digest(place: Path, name: str, progress: Progress) -> str:
    # md5 is what the archives publish; it finds damage, not intent
    digest = hashlib.new(name, usedforsecurity=False)
    done, total = 0, place.stat().st_size
    with place.open("rb") as handle:
        while block := handle.read(_HASH_BYTES):
            digest.update(block)
            done += len(block)
            progress(done, total)
    return digest.hexdigest()


def plan_corpus(
    corpus: Corpus, sources: Path | None = None, *, checksums: bool = False, progress: Progress = ignore
) -> dict[str, Any]:
    """What to get from where, what is there, what is not verified, and what a build would take. Writes nothing.

    Returns
    -------
    dict
        corpus, title, sources, datasets (name, title, kind, accession, portal, expected, files, evidence, not_shown,
        candidates, sizes estimated), n_missing, n_other, missing (paths), rules, expected, store_bytes_estimated,
        shard_bytes_estimated, notes.
    """
    datasets = [
        _dataset_plan(dataset, file_states(dataset, sources, checksums=checksums, progress=progress))
        for dataset in corpus.datasets
    ]
    files = [entry for dataset in datasets for entry in dataset["files"]]
    return {
        "corpus": corpus.name, "title": corpus.title, "description": corpus.description, "citation": corpus.citation,
        "sources": None if sources is None else str(sources), "datasets": datasets,
        "n_missing": sum(entry["state"] == "missing" for entry in files),
        "n_other": sum(entry["state"] == "other" for entry in files),
        "missing": [entry["path"] for entry in files if entry["state"] == "missing"],
        "rules": corpus.curation.tree()["rules"], "epochs": corpus.epochs, "notes": list(corpus.notes),
        "expected": {"samples": corpus.expected.samples, "genes": corpus.expected.genes},
        "store_bytes_estimated": sum(d["store_bytes_estimated"] or 0 for d in datasets),
        "shard_bytes_estimated": sum(d["shard_bytes_estimated"] or 0 for d in datasets),
    }  # fmt: skip


def _dataset_plan(dataset: CorpusDataset, states: list[FileState]) -> dict[str, Any]:
    expected = dataset.expected
    in_store, in_shards = expected.source_samples or expected.samples, expected.samples or expected.source_samples
    n_genes = expected.genes or expected.source_genes or _GENES_BULK
    per_sample = _VALUES_A_CELL if dataset.modality == "sc" else int(n_genes * _SHARE_OF_GENES_BULK)
    return {
        "name": dataset.name, "title": dataset.title, "kind": dataset.kind, "modality": dataset.modality,
        "accession": dataset.source.accession, "portal": dataset.source.portal, "gene_ids": dataset.gene_ids,
        "expected": {key: getattr(expected, key) for key in ("samples", "genes", "source_samples", "source_genes")},
        "files": [
            {
                "path": s.file.path, "what": s.file.what, "url": s.file.url, "state": s.state, "problem": s.problem,
                "bytes_stated": s.file.bytes, "bytes_found": s.found_bytes,
            }
            for s in states
        ],
        "evidence": [{"fields": list(entry.fields), "by": entry.by} for entry in dataset.evidence],
        "not_shown": dataset.open_facts(), "candidates": list(dataset.candidates),
        "store_bytes_estimated": None if in_store is None else int(in_store * per_sample * _BYTES_A_VALUE),
        "shard_bytes_estimated": (
            None if in_shards is None else int(in_shards * per_sample * _BYTES_A_VALUE_SHARDED)
        ),
    }  # fmt: skip


def plan_text(plan: dict[str, Any]) -> str:
    """A plan as a person reads it."""
    lines = [f"{plan['corpus']}: {plan['title']}"]
    for dataset in plan["datasets"]:
        lines += ["", *_dataset_lines(dataset)]
    lines += ["", "rules, in this order:"]
    lines += [f"  {at}. {_rule_line(rule)}" for at, rule in enumerate(plan["rules"], start=1)]
    sizes = plan["expected"]
    whole = [
        f"{sizes[key]:,} {word}" for key, word in (("samples", "samples"), ("genes", "genes in all")) if sizes[key]
    ]
    if whole:
        lines.append(f"expected of the whole: {', '.join(whole)}")
    store, shards = plan["store_bytes_estimated"] / 1e9, plan["shard_bytes_estimated"] / 1e9
    lines.append(
        f"a build takes about {store:,.1f} GB of store and {shards:,.1f} GB of shards (assuming {_VALUES_A_CELL:,} genes above "
        "zero in a cell)"
    )
    lines += [f"note: {note}" for note in plan["notes"]]
    if plan["sources"] is None:
        lines.append("sources: not looked for; name their folder with --sources")
    else:
        n, n_missing, n_other = sum(len(d["files"]) for d in plan["datasets"]), plan["n_missing"], plan["n_other"]
        lines.append(
            f"sources: {plan['sources']}: {n - n_missing - n_other} of {n} files there, {n_missing} missing, {n_other} with "
            "another size or checksum"
        )
    return "\n".join(lines)


def _dataset_lines(dataset: dict[str, Any]) -> Iterator[str]:
    expected = dataset["expected"]
    size = " x ".join("?" if expected[key] is None else f"{expected[key]:,}" for key in ("samples", "genes"))
    doubt = " [not shown that the paper used this]" if IDENTITY in dataset["not_shown"] else ""
    yield f"{dataset['name']} ({size}): {dataset['title']}{doubt}"
    where = " ".join(filter(None, (dataset["accession"], dataset["portal"])))
    yield f"  from: {where or 'not known'}; read as {dataset['kind']}"
    for file in dataset["files"]:
        size = "" if file["bytes_stated"] is None else f", {file['bytes_stated']:,} bytes"
        yield f"  [{file['state']}] {file['path']}: {file['what']}{size}{' ' + file['problem'] if file['problem'] else ''}"
        if file["url"]:
            yield f"      {file['url']}"
    for entry in dataset["evidence"]:
        if IDENTITY in entry["fields"]:
            yield f"  used by the paper: shown: {entry['by']}"
    if IDENTITY in dataset["not_shown"]:
        yield f"  used by the paper: not shown: {dataset['not_shown'][IDENTITY]}"
    for entry in dataset["evidence"]:
        if fields := [name for name in entry["fields"] if name != IDENTITY]:
            yield f"  shown: {', '.join(fields)}: {entry['by']}"
    for name, note in dataset["not_shown"].items():
        if name != IDENTITY:
            yield f"  not shown: {name}: {note}"
    for candidate in dataset["candidates"]:
        yield f"  candidate: {candidate}"


def _rule_line(rule: dict[str, Any]) -> str:
    shown = {k: v for k, v in rule.items() if k not in ("rule", "note") and v not in (None, False, [], "")}
    if "embedding" in shown:
        shown["embedding"] = shown["embedding"]["kind"]
    return f"{rule['rule']} " + ", ".join(f"{key}={value}" for key, value in shown.items())


def missing_text(corpus: Corpus, states: list[FileState]) -> str:
    """What is missing and where it can be had, as the end of an error."""
    by_dataset: dict[str, list[str]] = {}
    for state in states:
        by_dataset.setdefault(state.dataset, []).append(state.file.path)
    parts = []
    for name, paths in by_dataset.items():
        source = corpus.dataset(name).source
        where = source.accession or source.portal
        parts.append(f"{name}: {', '.join(paths)}" + (f" (from {where})" if where else ""))
    return "; ".join(parts)
