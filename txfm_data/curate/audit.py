"""The audit of a curation: samples and genes in and out of each rule and dataset, as JSON, as text and as a figure.

Nothing in it depends on when or how fast it was made, so two runs of one recipe write the same bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT, VERSION = "txfm-curation-audit", 1
AUDIT_JSON, AUDIT_TEXT, AUDIT_PLOT = "audit.json", "audit.txt", "audit.png"
_PLOTTED = 24
"""Datasets that the figure names; the smallest beyond them are drawn as one."""


@dataclass(frozen=True, kw_only=True)
class DatasetStep:
    """What one rule did to one dataset.

    details : what the rule has to tell besides, ready for JSON.
    """

    dataset: str
    samples_in: int
    samples_out: int
    genes_in: int
    genes_out: int
    details: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one rule did.

    number : from 1.  parameters : of the rule, defaults included.  genes_union_* : genes of the vocabulary.
    samples_val : held out after it.  warnings : to be read by a person.
    """

    number: int
    rule: str
    note: str
    parameters: dict[str, Any]
    datasets: tuple[DatasetStep, ...]
    genes_union_in: int
    genes_union_out: int
    samples_val: int
    warnings: tuple[str, ...]

    @property
    def samples_in(self) -> int:
        """Samples of the datasets that it applied to, before."""
        return sum(step.samples_in for step in self.datasets)

    @property
    def samples_out(self) -> int:
        """The same after it."""
        return sum(step.samples_out for step in self.datasets)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The whole curation.

    store : fingerprint of what was curated, by dataset.  recipe : with every default.
    start : samples and genes of each dataset before the first rule.  result : after the last, for those with samples.
    """

    store: tuple[dict[str, Any], ...]
    recipe: dict[str, Any]
    recipe_sha256: str
    start: tuple[dict[str, Any], ...]
    steps: tuple[Step, ...]
    result: tuple[dict[str, Any], ...]
    genes_union: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of all rules."""
        return tuple(text for step in self.steps for text in step.warnings)

    def tree(self) -> dict[str, Any]:
        """As the JSON file has it."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return {"format": FORMAT, "version": VERSION} | plain


def write_audit(folder: Path, audit: Audit) -> None:
    """Write the three files of an audit into a folder."""
    (folder / AUDIT_JSON).write_text(json.dumps(audit.tree(), indent=1) + "\n", encoding="utf-8")
    (folder / AUDIT_TEXT).write_text("\n".join(audit_lines(audit)) + "\n", encoding="utf-8")
    _plot(folder / AUDIT_PLOT, audit)


def audit_lines(audit: Audit) -> list[str]:
    """The audit as a person reads it: a table for each rule, its warnings, and what is left."""
    lines = ["Curation: samples and genes before and after each rule", ""]
    lines += _table([(d["name"], None, d["samples"], None, d["genes"]) for d in audit.start], "store")
    for step in audit.steps:
        lines += ["", f"{step.number}. {_title(step)}"]
        if step.note:
            lines.append(f"   {step.note}")
        lines += _table(
            [(d.dataset, d.samples_in, d.samples_out, d.genes_in, d.genes_out) for d in step.datasets], "dataset"
        )
        held = f"; {step.samples_val:,} samples held out" if step.samples_val else ""
        lines.append(f"   vocabulary: {step.genes_union_in:,} -> {step.genes_union_out:,} genes{held}")
        lines += [f"   {d.dataset}: {_said(d.details)}" for d in step.datasets if d.details]
        lines += [f"   WARNING: {text}" for text in step.warnings]
    samples, val = (sum(d[key] for d in audit.result) for key in ("samples", "samples_val"))
    lines += [
        "",
        f"Left: {samples:,} samples ({val:,} held out) of {len(audit.result)} datasets, {audit.genes_union:,} genes",
    ]
    lines += _table([(d["name"], None, d["samples"], None, d["genes"]) for d in audit.result], "dataset")
    return lines


def _title(step: Step) -> str:
    shown = {
        k: v
        for k, v in step.parameters.items()
        if k not in ("datasets", "note") and not (v is None or v is False or v in ([], ""))
    }
    return f"{step.rule} ({', '.join(f'{k}: {_value(v)}' for k, v in shown.items())})"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        shown = ", ".join(map(_value, value[:8]))
        return f"[{shown}{f', … {len(value)} in all' if len(value) > 8 else ''}]"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _said(details: dict[str, Any]) -> str:
    return "; ".join(
        f"{key.replace('_', ' ')} {_value(value)}" for key, value in details.items() if value not in (None, [])
    )


def _table(rows: Sequence[tuple[str, int | None, int, int | None, int]], title: str) -> list[str]:
    """Rows of (name, samples in, samples out, genes in, genes out) with a total of the samples; None leaves a column out."""
    if not rows:
        return ["   applies to no dataset"]
    width = max(len(title), 5, *(len(row[0]) for row in rows))
    is_step = rows[0][1] is not None
    heads = ("samples in", "samples out", "kept", "genes in", "genes out") if is_step else ("samples", "genes")
    lines = [f"   {title:<{width}}" + "".join(f"{head:>14}" for head in heads)]
    total_in, total_out = sum(row[1] or 0 for row in rows), sum(row[2] for row in rows)
    for name, samples_in, samples_out, genes_in, genes_out in rows:
        if samples_in is None or genes_in is None:
            cells = [f"{samples_out:,}", f"{genes_out:,}"]
        else:
            cells = [
                f"{samples_in:,}",
                f"{samples_out:,}",
                _share(samples_out, samples_in),
                f"{genes_in:,}",
                f"{genes_out:,}",
            ]
        lines.append(f"   {name:<{width}}" + "".join(f"{cell:>14}" for cell in cells))
    if len(rows) > 1:
        cells = [f"{total_in:,}", f"{total_out:,}", _share(total_out, total_in)] if is_step else [f"{total_out:,}"]
        lines.append(f"   {'total':<{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _plot(path: Path, audit: Audit) -> None:
    """Samples left after each rule, stacked by dataset, and below it the genes of the vocabulary."""
    from matplotlib.figure import Figure

    labels = ["store", *(f"{step.number}. {step.rule}" for step in audit.steps)]
    names, left = _samples_after(audit)
    figure = Figure(figsize=(max(6.4, 1.1 * len(labels) + 3), 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    base = [0.0] * len(labels)
    for name, counts in zip(names, left, strict=True):
        top.bar(labels, counts, bottom=base, label=f" {name}", width=0.7)  # matplotlib hides labels that begin with _
        base = [low + count for low, count in zip(base, counts, strict=True)]
    top.set_ylabel("samples left")
    top.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    genes = [
        audit.steps[0].genes_union_in if audit.steps else audit.genes_union,
        *(s.genes_union_out for s in audit.steps),
    ]
    bottom.bar(labels, genes, color="0.5", width=0.7)
    bottom.set_ylabel("genes of the\nvocabulary")
    for axes in (top, bottom):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
    bottom.tick_params(axis="x", rotation=30)
    for tick in bottom.get_xticklabels():
        tick.set_horizontalalignment("right")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _samples_after(audit: Audit) -> tuple[list[str], list[list[int]]]:
    """Names of datasets, the largest first and the rest as one, and their samples after each rule."""
    now = {d["name"]: d["samples"] for d in audit.start}
    course = {name: [n] for name, n in now.items()}
    for step in audit.steps:
        now |= {d.dataset: d.samples_out for d in step.datasets}
        for name, counts in course.items():
            counts.append(now[name])
    names = sorted(course, key=lambda name: (-course[name][0], name))
    shown, rest = names[:_PLOTTED], names[_PLOTTED:]
    left = [course[name] for name in shown]
    if rest:
        shown = [*shown, f"{len(rest)} others"]
        left.append([sum(counts) for counts in zip(*(course[name] for name in rest), strict=True)])
    return shown, left
