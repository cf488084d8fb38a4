"""What a build found beside what was expected: a table with every difference, and nothing left out in silence."""

from pathlib import Path
from typing import Any

import numpy as np

from txfm_data.corpora.recipe import CENSUS, Corpus, Expected
from txfm_data.selection import Selection, read_selection
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.opening import open_store


def compare(corpus: Corpus, store: Path, selection: Path, *, built: list[str]) -> dict[str, Any]:
    """Compare a build with what its corpus expects.

    corpus : all of it, whatever was left out.  built : names of the datasets that were built.

    What else a build adds under "missing" (names) and "other_files" (problems) is told by `report_text` too.

    Returns
    -------
    dict
        corpus, datasets (name, title, verdict, samples and genes each as expected, found, difference; in_store), whole (the
        same for all together), n_as_expected, n_differ, n_not_built, n_unstated.
    """
    opened = open_store(store)
    chosen = read_selection(selection, opened)
    rows = [_row(corpus, name, opened.datasets, chosen, name in built) for name in (d.name for d in corpus.datasets)]
    genes = len(np.unique(np.concatenate(chosen.genes)))
    whole = {
        "samples": _pair(corpus.expected.samples, len(chosen.sample_id)),
        "genes": _pair(corpus.expected.genes, genes),
        "verdict": _verdict(corpus.expected, len(chosen.sample_id), genes),
    }
    verdicts = [row["verdict"] for row in rows]
    return {
        "corpus": corpus.name, "title": corpus.title, "datasets": rows, "whole": whole,
        "n_as_expected": verdicts.count("as expected"), "n_differ": verdicts.count("differs"),
        "n_not_built": verdicts.count("not built"), "n_unstated": verdicts.count("nothing stated"),
    }  # fmt: skip


def _row(
    corpus: Corpus, name: str, records: tuple[DatasetRecord, ...], chosen: Selection, is_built: bool
) -> dict[str, Any]:
    dataset = corpus.dataset(name)
    others = {other.name for other in corpus.datasets if other.kind != CENSUS}
    mine = (
        [r for r in records if r.name == name]
        if dataset.kind != CENSUS
        else [r for r in records if r.name not in others]
    )
    names = {record.name for record in mine}
    samples, panels = 0, []
    for record, panel in zip(chosen.records, chosen.genes, strict=True):
        if record.name in names:
            low, high = np.searchsorted(chosen.sample_id, (record.obs_start, record.obs_stop))
            samples += int(high - low)
            panels.append(panel)
    genes = len(np.unique(np.concatenate(panels))) if panels else 0
    expected = dataset.expected
    return {
        "name": name, "title": dataset.title,
        "verdict": _verdict(expected, samples, genes) if is_built else "not built",
        "samples": _pair(expected.samples, samples if is_built else None),
        "genes": _pair(expected.genes, genes if is_built else None),
        "in_store": {
            "samples": _pair(expected.source_samples, sum(r.n_obs for r in mine) if is_built else None),
            "genes": _pair(expected.source_genes, max((r.n_panel for r in mine), default=0) if is_built else None),
        },
        "not_verified": sorted(dataset.open_facts()),
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
    head = ("dataset", "samples expected", "found", "difference", "genes expected", "found", "difference", "")
    rows = [head] + [_cells(row["name"], row) for row in report["datasets"]]
    rows.append(_cells("all together", report["whole"]))
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    lines = [f"{report['corpus']}: {report['title']}", ""]
    for row in rows:
        cells = [
            cell.ljust(w) if at in (0, 7) else cell.rjust(w)
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
    for row in report["datasets"]:
        sizes = row["in_store"]
        if any(sizes[key]["expected"] is not None and sizes[key]["found"] is not None for key in sizes):
            found, stated = (" x ".join(_number(sizes[key][part]) for key in sizes) for part in ("found", "expected"))
            lines.append(f"{row['name']} before curation: {found} in the store, {stated} stated of the source")
        if row["not_verified"]:
            lines.append(f"not verified of {row['name']}: {', '.join(row['not_verified'])}")
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
    return (name, *numbers, row["verdict"])
