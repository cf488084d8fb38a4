"""The rule phenoprints: keeps the perturbations of a screen whose cells are more alike than random cells are, and its controls.

`embedding` says where the cells lie, `consistency` how alike those of a perturbation are; here is what becomes of the samples,
and the tables and the figure that show why.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from txfm_data.curate.aligned import EmbeddingFile
from txfm_data.curate.consistency import Consistency, ConsistencyOptions, perturbation_consistency
from txfm_data.curate.embedding import check_embedding, fingerprint_of, make_embedding
from txfm_data.curate.figures import plot_phenoprints
from txfm_data.curate.labels import Codes, read_codes, read_controls
from txfm_data.curate.recipe import Phenoprints
from txfm_data.curate.state import Context, Details, State
from txfm_data.ingest.labels import MISSING
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store

_CURVE_STEPS = 100
"""Values of tau from 0 to 1 in the table of the curve, beside those of the rule."""
_SHOWN = 20
"""Batches without controls that the audit names."""
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Labels:
    """Labels of all samples of a store.

    perturbation, batch : codes of text.  is_control : (store.n_obs,) bool.
    """

    perturbation: Codes
    batch: Codes
    is_control: np.ndarray

    @classmethod
    def read(cls, store: Store) -> "Labels":
        """Read the columns perturbation, batch and is_control of obs."""
        return cls(read_codes(store, "perturbation"), read_codes(store, "batch"), read_controls(store))

    def is_perturbed(self, rows: np.ndarray) -> np.ndarray:
        """Which samples have a perturbation and are not controls: (n,) bool."""
        none = self.perturbation.values.index(MISSING) if MISSING in self.perturbation.values else -1
        codes = self.perturbation.codes[rows]
        found: np.ndarray = (codes >= 0) & (codes != none) & ~self.is_control[rows]
        return found


@dataclass(frozen=True, eq=False)
class Screen:
    """The samples of one dataset that are left, by perturbation.

    rows : (n,) int64, sample ids, ascending.  group : (n,) int32, number of the perturbation, -1 for none.
    names : of the P perturbations, ascending.  is_control, is_used : (n,) bool; used are those that are looked at.
    """

    rows: np.ndarray
    group: np.ndarray
    names: tuple[str, ...]
    is_control: np.ndarray
    is_used: np.ndarray

    @property
    def n_cells(self) -> np.ndarray:
        """Samples of each perturbation that are left, (P,) int64."""
        return np.bincount(self.group[self.group >= 0], minlength=len(self.names))


def check_phenoprints(rule: Phenoprints, store: Store, records: tuple[DatasetRecord, ...]) -> None:
    """Refuse what can be told before any rule is applied.

    Raises
    ------
    ValueError, FileNotFoundError
        If a dataset that the rule names has no perturbations, a screen has no controls, a number of cells is asked for of
        several screens, or the embedding cannot be had.
    """
    labels = Labels.read(store)
    screens = []
    for record in records:
        rows = np.arange(record.obs_start, record.obs_stop)
        if _is_screen(rule, labels, record):
            screens.append(record)
            if not labels.is_control[rows].any():
                raise ValueError(
                    f"no sample of dataset {record.name!r} is a control (is_control); phenoprints are told from "
                    "controls, so ingest it with --control, or name other datasets"
                )
    if rule.calibrate_to is not None and len(screens) > 1:
        raise ValueError(
            f"calibrate_to is the number of cells of one screen, but there are {len(screens)}: "
            f"{[record.name for record in screens]}; write a rule for each with datasets: [NAME]"
        )
    check_embedding(rule.embedding, store, tuple(screens))


def apply_phenoprints(rule: Phenoprints, state: State, records: tuple[DatasetRecord, ...], context: Context) -> Details:
    """Drop the samples of perturbations that are not consistent, from all batches; controls stay.

    For each screen four files are written to `context.extras`, whose names begin with ``phenoprints_NUMBER_DATASET``: a table of
    its perturbations (.parquet, .tsv), what each tau would keep (_curve.tsv), and a figure of both (.png).

    Raises
    ------
    ValueError, OSError
        If a screen has too few cells or controls to look at, or its embedding cannot be had.
    """
    labels, used = Labels.read(state.store), fingerprint_of(rule.embedding)
    details: Details = {}
    for record in records:
        if not _is_screen(rule, labels, record):
            details[record.name] = {"skipped": "not a screen: no sample has a perturbation"}
            continue
        screen = _screen(rule, state, record, labels)
        if not screen.names:
            details[record.name] = {"skipped": "no sample with a perturbation is left"}
            continue
        details[record.name] = _judge(rule, state, record, screen, labels, context)
        if used:
            details[record.name]["embedding_sha256"] = used
    if records and all("skipped" in of_one for of_one in details.values()):
        details[records[0].name]["warning"] = (
            f"nothing is done: none of the {len(records)} datasets that the rule looks at is a screen with perturbations left; "
            "ingest with --perturbation and --control, or leave the rule out"
        )
    return details


def _is_screen(rule: Phenoprints, labels: Labels, record: DatasetRecord) -> bool:
    """Whether any sample of a dataset has a perturbation; if the rule names the dataset, one must."""
    if labels.is_perturbed(np.arange(record.obs_start, record.obs_stop)).any():
        return True
    if rule.datasets is not None and record.name in rule.datasets:
        raise ValueError(
            f"no sample of dataset {record.name!r} has a perturbation; ingest it with --perturbation and "
            "--control, or leave it out of datasets"
        )
    return False


def _screen(rule: Phenoprints, state: State, record: DatasetRecord, labels: Labels) -> Screen:
    rows = state.rows(record)
    is_perturbed, is_control = labels.is_perturbed(rows), labels.is_control[rows]
    codes, numbers = np.unique(labels.perturbation.codes[rows[is_perturbed]], return_inverse=True)
    group = np.full(len(rows), -1, np.int32)
    group[is_perturbed] = numbers
    is_used = is_perturbed | is_control
    if rule.batches == "train" and state.is_val is not None:
        is_used &= ~state.is_val[rows]
    names = tuple(str(labels.perturbation.values[code]) for code in codes.tolist())
    return Screen(rows, group, names, is_control, is_used)


def _judge(
    rule: Phenoprints, state: State, record: DatasetRecord, screen: Screen, labels: Labels, context: Context
) -> dict[str, Any]:
    """Test the perturbations of one screen, drop the samples of those that fail, write the files and say what happened."""
    where = f"rule {context.number} ({rule.name}): dataset {record.name!r}"
    _check_cells(where, screen, rule)
    batches, batch = np.unique(labels.batch.codes[screen.rows[screen.is_used]], return_inverse=True)
    try:
        found, width = _consistency(rule, state, record, screen, batch, context)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}; if the dataset cannot be judged so, let the rule name others (datasets)"
        ) from error
    found = replace(found, p=np.where(found.n_cells < rule.min_cells, np.nan, found.p))
    if np.isnan(found.p).all():
        raise ValueError(
            f"{where}: no perturbation has {rule.min_cells} cells to look at; lower min_cells, or drop fewer before"
        )
    cells = _CellsByTau(found.p, screen, rule.unassigned == "keep")
    tau, warnings = _choose_tau(rule, cells)
    is_kept = found.p < tau  # not of NaN: what cannot be tested is dropped
    warnings += [*_reach(rule, found, tau), *_extremes(found, is_kept, tau), *_unseen(rule, state)]
    stays = screen.is_control | np.append(is_kept, rule.unassigned == "keep")[screen.group]
    state.alive[screen.rows[~stays]] = False
    files = _write_files(rule, record, screen, found, is_kept, tau, cells, context)
    uncontrolled = [_name_of(labels.batch, int(batches[code])) for code in found.batches_without_controls]
    context.say(
        f"{record.name}: {is_kept.sum():,} of {len(is_kept):,} perturbations have p below {tau:g}; {stays.sum():,} of "
        f"{len(stays):,} samples stay"
    )
    tested = found.p[~np.isnan(found.p)]
    details: dict[str, Any] = {
        "tau": tau, "n_perturbations": len(is_kept), "n_kept": int(is_kept.sum()), "n_untestable": int(np.isnan(found.p).sum()),
        "n_controls": int(screen.is_control.sum()), "n_unassigned": int(((screen.group < 0) & ~screen.is_control).sum()),
        "n_cells_tested": int(found.n_cells.sum()), "n_controls_used": found.n_controls, "n_null": int(found.n_null.max()),
        "p_quantiles": {f"{q:g}": round(float(np.quantile(tested, q)), 6) for q in _QUANTILES},
        "batches_without_controls": uncontrolled[:_SHOWN], "n_batches_without_controls": len(uncontrolled),
        "embedding": f"{rule.embedding.kind}, width {width}, {found.n_components} components", "files": files,
    }  # fmt: skip
    return details | ({"warning": "; ".join(warnings)} if warnings else {})


def _check_cells(where: str, screen: Screen, rule: Phenoprints) -> None:
    """Refuse a screen that nothing could be said about."""
    among = "left" if screen.is_used.sum() == len(screen.rows) else "left in the batches that are looked at"
    n_controls = int((screen.is_control & screen.is_used).sum())
    if n_controls < 2:
        raise ValueError(
            f"{where}: {n_controls} controls are {among}, at least 2 are needed to align cells on; keep more controls in the rules "
            "before (keep_controls: true), hold out fewer batches, or let the rule name other datasets"
        )
    n_cells = np.bincount(screen.group[screen.is_used & (screen.group >= 0)], minlength=len(screen.names))
    if n_cells.max() < 2:
        raise ValueError(
            f"{where}: of {len(screen.names)} perturbations none has two cells {among}, so none can be tested; drop fewer before"
        )
    if np.count_nonzero(n_cells) == 1 and not rule.null_controls:
        raise ValueError(
            f"{where}: a single perturbation has cells {among}, so there are no random cells of others to compare with; set "
            "null_controls: true to compare with controls"
        )


def _consistency(
    rule: Phenoprints, state: State, record: DatasetRecord, screen: Screen, batch: np.ndarray, context: Context
) -> tuple[Consistency, int]:
    """Embed the cells that are looked at, and no others, and test their perturbations; (result, width of the embedding)."""
    alive = np.zeros_like(state.alive)
    alive[screen.rows[screen.is_used]] = True
    path = make_embedding(rule.embedding, replace(state, alive=alive), record, context)
    options = ConsistencyOptions(
        null=rule.null, n_null=rule.n_null, null_controls=rule.null_controls, reference=rule.reference,
        seed=context.seed if rule.seed is None else rule.seed,
    )  # fmt: skip
    embedding = EmbeddingFile(path)
    found = perturbation_consistency(
        embedding, screen.group[screen.is_used], screen.is_control[screen.is_used], batch, options,
        n_perturbations=len(screen.names), memory=context.memory,
        progress=context.progress(f"consistency of dataset {record.name!r}"),
    )  # fmt: skip
    path.unlink()
    return found, embedding.d


def _name_of(codes: Codes, code: int) -> str:
    return MISSING if code < 0 else str(codes.values[code])


class _CellsByTau:
    """How many perturbations and cells any tau would keep; cells include controls, and the unassigned where those stay."""

    def __init__(self, p: np.ndarray, screen: Screen, keeps_unassigned: bool) -> None:
        order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]  # NaN sort last
        always = screen.is_control | (screen.group < 0) if keeps_unassigned else screen.is_control
        self.p = p[order]
        self.cells = np.concatenate([[0], np.cumsum(screen.n_cells[order])]) + np.count_nonzero(always)

    def kept(self, tau: float) -> tuple[int, int]:
        """Perturbations with p below `tau`, and cells kept."""
        n = int(np.searchsorted(self.p, tau, side="left"))
        return n, int(self.cells[n])


def _choose_tau(rule: Phenoprints, cells: _CellsByTau) -> tuple[float, list[str]]:
    """The tau of the rule, or the one of its `taus` that keeps the number of cells nearest to `calibrate_to`; and warnings."""
    if rule.calibrate_to is None:
        return (0.1 if rule.tau is None else rule.tau), []
    target = rule.calibrate_to
    tau = min(rule.taus, key=lambda tau: (abs(cells.kept(tau)[1] - target), tau))
    n_cells = cells.kept(tau)[1]
    miss = (n_cells - target) / target
    if abs(miss) <= rule.tolerance:
        return tau, []
    return tau, [
        f"the nearest of taus {list(rule.taus)}, {tau:g}, keeps {n_cells:,} cells, {miss:+.1%} off the {target:,} asked for; "
        f"allowed are {rule.tolerance:.1%}"
    ]


def _reach(rule: Phenoprints, found: Consistency, tau: float) -> list[str]:
    """Warn where so few random cells were drawn that even the least possible p is not below tau."""
    is_tested = ~np.isnan(found.p)
    out_of_reach = int(np.count_nonzero(is_tested & (1 / (1 + found.n_null) >= tau)))
    if not out_of_reach:
        return []
    return [
        f"{out_of_reach:,} perturbations had fewer than {int(1 / tau):,} random cells to compare with, so their p cannot be below "
        f"{tau:g}; raise n_null, or set null_controls: true"
    ]


def _extremes(found: Consistency, is_kept: np.ndarray, tau: float) -> list[str]:
    """Warn where the choice is none: of all perturbations that can be tested none is kept, or all are."""
    n_tested, n_kept = int(np.count_nonzero(~np.isnan(found.p))), int(is_kept.sum())
    if 0 < n_kept < n_tested:
        return []
    least = float(np.nanmin(found.p))
    if not n_kept:
        return [
            f"no perturbation is kept: of {n_tested:,} that can be tested none has p below {tau:g}, the least is {least:.3g}; "
            "look whether the embedding is that of these cells, or raise tau"
        ]
    return [f"all {n_tested:,} perturbations that can be tested are kept, none has p of {tau:g} or above; lower tau"]


def _unseen(rule: Phenoprints, state: State) -> list[str]:
    """Warn where the rule asks for the batches to train on while none is held out yet."""
    if rule.batches == "all" or (state.is_val is not None and state.is_val.any()):
        return []
    return [
        "no batch is held out yet, so all were looked at: batches that are held out later will have taken part in the choice; "
        "put hold_out before this rule, or set batches: all to say that this is meant"
    ]


def _write_files(
    rule: Phenoprints, record: DatasetRecord, screen: Screen, found: Consistency, is_kept: np.ndarray, tau: float,
    cells: _CellsByTau, context: Context,
) -> list[str]:  # fmt: skip
    """Write the tables and the figure of a screen; returns their names."""
    context.extras.mkdir(parents=True, exist_ok=True)
    stem = f"phenoprints_{context.number}_{record.name}"
    names = [f"{stem}{end}" for end in (".parquet", ".tsv", "_curve.tsv", ".png")]
    paths = [context.extras / name for name in names]
    order = np.lexsort((np.arange(len(found.p)), -found.statistic, found.p))  # the most consistent first, NaN last
    table = pa.table({
        "perturbation": pa.array([screen.names[g] for g in order.tolist()], pa.string()),
        "n_cells": pa.array(screen.n_cells[order], pa.int64()), "n_cells_train": pa.array(found.n_cells[order], pa.int64()),
        "statistic": pa.array(found.statistic[order], pa.float64(), from_pandas=True),  # NaN become null
        "p": pa.array(found.p[order], pa.float64(), from_pandas=True), "kept": pa.array(is_kept[order], pa.bool_()),
    })  # fmt: skip
    pq.write_table(table, paths[0])
    _write_tsv(paths[1], table.column_names, [list(row.values()) for row in table.to_pylist()])
    taus = sorted({round((i + 1) / _CURVE_STEPS, 6) for i in range(_CURVE_STEPS)} | set(rule.taus) | {tau})
    _write_tsv(paths[2], ("tau", "n_perturbations", "n_cells"), [[value, *cells.kept(value)] for value in taus])
    plot_phenoprints(
        paths[3], title=record.name, p=cells.p, cells=cells.cells, tau=tau, n_asked=rule.calibrate_to,
        n_untestable=int(np.isnan(found.p).sum()),
    )  # fmt: skip
    return names


def _write_tsv(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    def text(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")  # quotes a label that has a tab in it
        writer.writerow(names)
        writer.writerows([text(value) for value in row] for row in rows)
