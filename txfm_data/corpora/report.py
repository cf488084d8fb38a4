"""What a build found beside what was expected: a table with every difference, and nothing left out in silence."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from txfm_data.corpora.entries import CENSUS
from txfm_data.corpora.recipe import Corpus, Expected
from txfm_data.selection import Selection, read_selection
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.opening import open_store

_MUCH_HELD_OUT = 0.3
"""A dataset with a larger share of its samples held out is warned of: one of few batches loses much."""


def compare(
    corpus: Corpus, store: Path, selection: Path, *, built: list[str], n_val: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Compare a build with what its corpus expects.

    corpus : all of it, whatever was left out.  built : names of the datasets that were built.
    n_val : of each dataset of the store, the samples held out; by default those of the selection, if it says.

    What else a build adds under "missing" (names) and "other_files" (problems) is told by `report_text` too.

    Returns
    -------
    dict
        corpus, datasets (name, title, verdict, samples and genes each as expected, found, difference; of (which samples the
        expected number counts); train, val (samples); in_store; not_shown), whole (the same for all together), warnings,
        n_as_expected, n_differ, n_not_built, n_unstated.
    """
    opened = open_store(store)
    chosen = read_selection(selection, opened)
    found = _found(chosen, n_val)
    rows = [_row(corpus, name, opened.datasets, found, name in built) for name in (d.name for d in corpus.datasets)]
    verdicts = [row["verdict"] for row in rows]
    return {
        "corpus": corpus.name, "title": corpus.title, "datasets": rows,
        "whole": _compared(corpus.expected, list(found.values())),
        "warnings": [
            f"{name}: {part.n_val / part.n_samples:.0%} of its samples are held out: it has few experimental batches"
            for name, part in found.items()
            if part.n_val is not None and part.n_val > _MUCH_HELD_OUT * part.n_samples
        ],
        "n_as_expected": verdicts.count("as expected"), "n_differ": verdicts.count("differs"),
        "n_not_built": verdicts.count("not built"), "n_unstated": verdicts.count("nothing stated"),
    }  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """What a selection has of one dataset of the store. n_val : None if nothing says what is held out."""

    genes: np.ndarray
    n_samples: int
    n_val: int | None


def _found(chosen: Selection, n_val: Mapping[str, int] | None) -> dict[str, _Part]:
    parts = {}
    for record, panel in zip(chosen.records, chosen.genes, strict=True):
        low, high = np.searchsorted(chosen.sample_id, (record.obs_start, record.obs_stop))
        held = None if chosen.is_val is None else int(np.count_nonzero(chosen.is_val[low:high]))
        if n_val is not None:
            held = n_val.get(record.name, held)
        parts[record.name] = _Part(panel, int(high - low), held)
    return parts


def _compared(expected: Expected, parts: list[_Part]) -> dict[str, Any]:
    """Numbers of several datasets of the store together beside the expected ones."""
    n = sum(part.n_samples for part in parts)
    val = None if any(part.n_val is None for part in parts) else sum(part.n_val or 0 for part in parts)
    genes = len(np.unique(np.concatenate([part.genes for part in parts]))) if parts else 0
    counted = n if expected.of == "all" or val is None else n - val
    return {
        "samples": _pair(expected.samples, counted), "of": expected.of, "genes": _pair(expected.genes, genes),
        "train": None if val is None else n - val, "val": val, "verdict": _verdict(expected, counted, genes),
    }  # fmt: skip


def _row(
    corpus: Corpus, name: str, records: tuple[DatasetRecord, ...], found: Mapping[str, _Part], is_built: bool
) -> dict[str, Any]:
    dataset, expected = corpus.dataset(name), corpus.dataset(name).expected
    others = {other.name for other in corpus.datasets if other.kind != CENSUS}
    mine = [r for r in records if (r.name not in others if dataset.kind == CENSUS else r.name == name)]
    compared = _compared(expected, [found[r.name] for r in mine if r.name in found])
    stored = (sum(r.n_obs for r in mine), max((r.n_panel for r in mine), default=0))
    if not is_built:
        compared |= {
            "samples": _pair(expected.samples, None), "genes": _pair(expected.genes, None), "train": None, "val": None,
            "verdict": "not built",
        }  # fmt: skip
    return compared | {
        "name": name, "title": dataset.title,
        "in_store": {
            "samples": _pair(expected.source_samples, stored[0] if is_built else None),
            "genes": _pair(expected.source_genes, stored[1] if is_built else None),
        },
        "not_shown": sorted(dataset.open_facts()),
    }  # fmt: skip


def _pair(expected: int | None, found: int | None) -> dict[str, int | None]:
    difference = None if expected is None or found is None else found - expected
    return {"expected": expected, "found": found, "difference": difference}


def _verdict(expected: Expected, samples: int, genes: int) -> str:
    if expected.samples is None and expected.genes is None:
        return "nothing stated"
    far = expected.samples is not None and abs(samples - expected.samples) > expected.within
    return "differs" if far or expected.genes not in (None, genes) else "as expected"


def report_text(report: dict[str, Any]) -> str:
    """The comparison as a table of plain text."""
    head = (
        "dataset", "samples expected", "found", "difference", "genes expected", "found", "difference", "train", "held out", "",
    )  # fmt: skip
    rows = [head] + [_cells(row["name"], row) for row in report["datasets"]]
    rows.append(_cells("all together", report["whole"]))
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    lines = [f"{report['corpus']}: {report['title']}", ""]
    for row in rows:
        cells = [
            cell.ljust(w) if at in (0, len(head) - 1) else cell.rjust(w)
            for at, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    n = len(report["datasets"])
    lines += [
        "",
        f"{report['n_as_expected']} of {n} datasets are as expected, {report['n_differ']} differ, {report['n_not_built']} were not "
        f"built, of {report['n_unstated']} no size is stated",
    ]
    lines += [f"left out, no source files: {name}" for name in report.get("missing", ())]
    lines += [f"other file than stated: {problem}" for problem in report.get("other_files", ())]
    lines += [f"WARNING: {text}" for text in report["warnings"]]
    for row in report["datasets"]:
        sizes = row["in_store"]
        if row["of"] == "train" and row["samples"]["expected"] is not None:
            lines.append(f"{row['name']}: the samples expected, and found beside them, are those to train on alone")
        if any(sizes[key]["expected"] is not None and sizes[key]["found"] is not None for key in sizes):
            found, stated = (" x ".join(_number(sizes[key][part]) for key in sizes) for part in ("found", "expected"))
            lines.append(f"{row['name']} before curation: {found} in the store, {stated} stated of the source")
        if row["not_shown"]:
            lines.append(f"not shown of {row['name']}: {', '.join(row['not_shown'])}")
    return "\n".join(lines) + "\n"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    numbers = []
    for key in ("samples", "genes"):
        for part in ("expected", "found", "difference"):
            value = row[key][part]
            sign = "+" if part == "difference" and value else ""
            numbers.append("-" if value is None else format(value, f"{sign},"))
    return (name, *numbers, _number(row["train"]), _number(row["val"]), row["verdict"])
