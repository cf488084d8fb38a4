"""A small corpus of three datasets (h5ad, table, gct) as a file, its sources, and calls that build it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from txfm_data.corpora.build import BuildOptions, buildable, check_build, ingest_corpus, select_corpus
from txfm_data.corpora.recipe import Corpus, read_corpus
from txfm_data.corpora.steps import Steps
from txfm_data.curate.run import CurateOptions
from txfm_data.progress import ignore
from txfm_data.simulate.formats import write_small_sources

NAMES = ("screen", "cells", "tissues")


def small_tree() -> dict[str, Any]:
    """The corpus as YAML would give it."""
    return {
        "name": "small",
        "title": "A small corpus",
        "expected": {"samples": 1000, "genes": 60},
        "epochs": 3,
        "datasets": [
            {
                "name": "screen",
                "title": "A screen",
                "source": {"accession": "X1", "files": [{"path": "a/screen.h5ad", "what": "counts", "url": "https://x"}]},
                "gene_ids": "ensembl_version",
                "ingest": {
                    "kind": "h5ad", "path": "a/screen.h5ad", "values": "counts", "batch": "lane", "perturbation": "guide",
                    "control": "none",
                },
                "expected": {"samples": 80, "genes": 42, "source_samples": 80},
                "evidence": [{"fields": ["identity", "ingest.batch"], "by": "the test"}],
                "unverified": [{"field": "ingest.control", "note": "not looked at"}],
            },
            {
                "name": "cells",
                "title": "Cells by symbols",
                "gene_ids": "symbol",
                "ingest": {
                    "kind": "table", "path": "cells.csv", "orientation": "samples-by-genes", "modality": "sc", "values": "counts",
                    "batch": "lane", "sample_table": "cells_labels.tsv", "min_matched": 0.3,
                },
                "expected": {"samples": 90},
            },
            {
                "name": "tissues",
                "title": "Tissues",
                "gene_ids": "ensembl_version",
                "ingest": {"kind": "gct", "path": "tissues.gct", "values": "counts"},
            },
        ],
        "curation": {"rules": [{"rule": "hold_out", "share": 0.2}, {"rule": "cap", "max_samples": 60, "datasets": ["cells"]}]},
    }  # fmt: skip


def write_corpus(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """The corpus as a file, perhaps changed."""
    tree = small_tree()
    if change is not None:
        change(tree)
    path = folder / f"{tree['name']}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def write_sources(folder: Path, corpus: Corpus) -> Path:
    """The sources of a corpus below a new folder."""
    sources = folder / "sources"
    write_small_sources(corpus, sources, samples=80, genes=60)
    return sources


def build(
    path: Path,
    sources: Path | None,
    out: Path,
    said: list[str] | None = None,
    change: Callable[[Corpus], Corpus] = lambda corpus: corpus,
    **options: Any,
) -> tuple[Corpus, list[str], bool]:
    """Ingest and curate; the corpus that was built, what was left out, and whether the selection was made now."""
    building = BuildOptions(sources=sources, out=out, **options)
    say = (said if said is not None else []).append
    corpus = change(read_corpus(path)).taken()
    check_build(corpus, building)
    corpus, without, other = buildable(corpus, building, ignore)
    steps = Steps(out, corpus.name)
    names = ingest_corpus(corpus, building, steps, other=other, progress=lambda label: ignore, say=say)
    return corpus, without, select_corpus(corpus, names, building, steps, CurateOptions(say=say))
