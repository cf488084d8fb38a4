"""Say what a store, a shard folder or a checkpoint holds."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.paths import kind_of
from tools.runner import Terminal, run_verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what a store, a shard folder or a checkpoint holds, without reading its counts or weights."""

    path: str
    """The folder."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Collect what is known of the folder."""
    kind = kind_of(options.path)
    if kind == "shards":
        return _shards(options.path)
    if kind == "checkpoint":
        from txfm_model.checkpoint import checkpoint_info

        return {"kind": kind, **checkpoint_info(options.path)}
    return _store(options.path)


def _store(path: str) -> dict[str, Any]:
    from txfm_data.store.describe import describe

    return describe(path)


def _shards(path: str) -> dict[str, Any]:
    from shards.manifest import SPLITS, Corpus

    corpus = Corpus(path)
    shards = [shard for split in SPLITS for shard in corpus.shards(split)]
    return {
        "kind": "shards", "path": path, "n_genes": len(corpus.vocabulary), "n_train": corpus.n_samples("train"),
        "n_val": corpus.n_samples("val"), "lanes": corpus.lanes, "shards": len(shards), "bytes": sum(s.bytes for s in shards),
        "target_sum": corpus.target_sum, "fingerprint": corpus.fingerprint, "vocabulary": corpus.vocabulary.fingerprint,
        "datasets": [asdict(d) | {"n_genes": len(corpus.panels.genes(d.panel_id))} for d in corpus.manifest.datasets],
    }  # fmt: skip


def summary(result: dict[str, Any]) -> str:
    """Names and values, one a line; datasets and the overlaps of their panels as tables."""
    lines = []
    for key, value in result.items():
        if key in ("datasets", "genes_in_common"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number:,}" for name, number in value.items())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
        lines.append(f"{key.replace('_', ' ')}: {value}")
    is_store = result["kind"] == "store"
    for d in result.get("datasets", []):
        samples = f"{d['n_obs']:,}" if is_store else f"{d['n_train']:,} train + {d['n_val']:,} validation"
        genes = d["n_panel"] if is_store else d["n_genes"]
        source = f", {d['values']}, from {d['source']}" if is_store else ""
        lines.append(f"  {d['name']}: {samples} samples x {genes:,} genes, {d['modality']}{source}")
    return "\n".join([*lines, *_overlaps(result.get("genes_in_common", {}))])


def _overlaps(common: dict[str, dict[str, int]]) -> list[str]:
    """Genes that each pair of datasets measured both, up to ten datasets wide."""
    if len(common) < 2:
        return []
    shown = list(common)[:10]
    width = max(8, *(len(name) for name in shown))
    lines = ["genes measured in both:", " ".join([" " * (width + 2), *(f"{name:>{width}}" for name in shown)])]
    for name in shown:
        lines.append(" ".join([f"  {name:<{width}}", *(f"{common[name][other]:>{width},}" for other in shown)]))
    return lines + ([f"  … and {len(common) - 10} datasets more (all with --json)"] if len(common) > 10 else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Say what a folder holds."""
    return run_verb("info", Options, run, summary, argv, positionals=("path",))


if __name__ == "__main__":
    sys.exit(main())
