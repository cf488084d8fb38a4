"""Say what a store, a selection, a shard folder or a checkpoint holds."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.paths import kind_of
from tools.runner import Terminal, run_verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what a store, a selection, a shard folder or a checkpoint holds, without reading its counts or weights."""

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
    if kind == "selection":
        from txfm_data.selection import inspect_selection

        return {"kind": kind, "path": options.path, **inspect_selection(options.path)}
    return _store(options.path)


def _store(path: str) -> dict[str, Any]:
    from txfm_data.store.describe import describe

    return describe(path)


def _shards(path: str) -> dict[str, Any]:
    from shards.describe import describe
    from shards.manifest import Corpus

    return describe(Corpus(path))


def summary(result: dict[str, Any]) -> str:
    """Names and values, one a line; datasets and the overlaps of their panels as tables."""
    if result["kind"] == "shards":
        return _shards_summary(result)
    if result["kind"] == "selection":
        return "\n".join(_selection_lines(result))
    lines = []
    for key, value in result.items():
        if key in ("datasets", "genes_in_common"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number:,}" for name, number in value.items())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
        lines.append(f"{key.replace('_', ' ')}: {value}")
    for d in result.get("datasets", []):
        lines.append(
            f"  {d['name']}: {d['n_obs']:,} samples x {d['n_panel']:,} genes, {d['modality']}, {d['values']}, from {d['source']}"
        )
    return "\n".join([*lines, *_overlaps(result.get("genes_in_common", {}))])


def _selection_lines(result: dict[str, Any]) -> list[str]:
    """A selection in words, a line for each dataset, and how it was made if a curation made it."""
    lines = [f"{key.replace('_', ' ')}: {result[key]}" for key in ("kind", "path", "sha256")]
    held = "" if result["n_val"] is None else f", {result['n_val']:,} of them held out"
    lines.append(f"samples: {result['n_samples']:,}{held}")
    lines += [
        f"  {d['name']}: {d['n_samples']:,} of {d['n_obs']:,} samples, {d['n_genes']:,} genes"
        for d in result["datasets"]
    ]
    lines += [f"{path.name}: {path.stat().st_size:,} bytes" for path in sorted(Path(result["path"]).iterdir())]
    return lines


def _shards_summary(result: dict[str, Any]) -> str:
    """A shard corpus in words, a line for each dataset."""
    order, splits = result["order"], result["splits"]
    lines = [f"{key}: {result[key]}" for key in ("kind", "path", "fingerprint", "vocabulary", "seed")]
    if result["selection"] is not None:
        lines.append(f"selection: {result['selection']}")
    lines.append(f"genes: {result['n_genes']:,}, libraries scaled to {result['target_sum']:,.0f} counts")
    for split, part in splits.items():
        lines.append(
            f"{split}: {part['samples']:,} samples in {part['blocks']:,} blocks of {part['smallest_block']:,} to "
            f"{part['largest_block']:,}, {part['shards']:,} shards, {part['bytes']:,} bytes"
        )
    lines.append(f"bytes a sample: {result['bytes_per_sample']:,.1f}")
    for name, found in result["mixing"].items():
        lines.append(
            f"mixing: a block holds {found['mean']:,.2f} of {found['there']:,} {name} on average, at least {found['minimum']:,}; "
            f"drawn at random it would be {found['expected']:,.2f}"
        )
    at_most = f", {order['largest_global_batch']:,} at most" if order["largest_global_batch"] is not None else ""
    lines.append(
        f"order: {result['lanes']:,} lanes, {order['mix_blocks']:,} blocks mixed; for "
        f"{' or '.join(f'{n:,}' for n in order['world_sizes'])} processes and global batches that are multiples of "
        f"{order['global_batch_multiple']:,}{at_most}; {order['samples_per_epoch']:,.0f} samples an epoch"
    )
    for name, kind in result["obs_columns"].items():
        lines.append(f"obs column: {name} ({kind})")
    for d in result["datasets"]:
        weight = f", weight {d['weight']:g}" if d["weight"] < 1 else ""
        names = ", ".join(d["val_batches"][:5]) + (
            f", … ({len(d['val_batches'])})" if len(d["val_batches"]) > 5 else ""
        )
        lines.append(
            f"  {d['name']}: {d['n_train']:,} train + {d['n_val']:,} validation samples x {d['n_genes']:,} genes, {d['modality']}"
            f"{weight}, held out: {d['held_out']}{f' {names}' if names else ''}"
        )
    return "\n".join(lines)


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
