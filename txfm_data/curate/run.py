"""Curates a store: applies the rules of a recipe in their order and writes the selection with its audit, whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from txfm_data.address import is_remote, local_path
from txfm_data.config_tree import to_tree
from txfm_data.curate import label_rules, phenoprint, quality, recipe
from txfm_data.curate.audit import Audit, DatasetStep, Step, write_audit
from txfm_data.curate.scratch import scratch_folder
from txfm_data.curate.state import Context, Details, Embedder, State, no_progress, say_nothing
from txfm_data.obs_filter import nearest
from txfm_data.parallel import Pool, Workers, pool
from txfm_data.progress import Progress
from txfm_data.selection import check_new_selection, write_selection
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.opening import open_store
from txfm_data.store.protocol import Store

Apply = Callable[[Any, State, tuple[DatasetRecord, ...], Context], Details]
Check = Callable[[Any, Store, tuple[DatasetRecord, ...]], None]

APPLY: dict[type[recipe.Rule], Apply] = {
    recipe.GenesByCells: quality.apply_genes_by_cells,
    recipe.CellsByGenes: quality.apply_cells_by_genes,
    recipe.FilterObs: label_rules.apply_filter,
    recipe.Keep: label_rules.apply_keep,
    recipe.Drop: label_rules.apply_drop,
    recipe.Subsample: label_rules.apply_subsample,
    recipe.Cap: label_rules.apply_cap,
    recipe.HoldOut: label_rules.apply_hold_out,
    recipe.Genes: label_rules.apply_genes,
    recipe.Phenoprints: phenoprint.apply_phenoprints,
}
CHECK: dict[type[recipe.Rule], Check] = {
    recipe.FilterObs: label_rules.check_filter,
    recipe.Keep: label_rules.check_keep,
    recipe.Drop: label_rules.check_drop,
    recipe.Subsample: label_rules.check_subsample,
    recipe.HoldOut: label_rules.check_hold_out,
    recipe.Genes: label_rules.check_genes,
    recipe.Phenoprints: phenoprint.check_phenoprints,
}
_NO_SAMPLES_LOST = (recipe.GenesByCells, recipe.HoldOut, recipe.Genes)
"""Rules that are not there to drop samples, so that keeping all of them is nothing to warn of."""
_REMOTE = ("s3:/", "gs:/", "az:/", "http:/", "https:/")
"""What `pathlib` makes of an address."""
_RESERVED = 512 * 1024**2
"""What the process holds besides a rule's own memory: the interpreter, Arrow, TileDB."""
_LEAST_MEMORY = 768 * 1024**2


@dataclass(frozen=True, kw_only=True)
class CurateOptions:
    """How a curation runs; what is selected does not depend on it, but for the device that a checkpoint computes on.

    workers : where counts are read, and the memory of all of it.  embed : opens checkpoints for phenoprints.
    scratch : folder for what is needed meanwhile; by default beside the selection.
    progress : makes the callback of a task from its label.  say : called with what a person should know.
    """

    workers: Workers = Workers()
    embed: Embedder | None = None
    scratch: str | Path | None = None
    progress: Callable[[str], Progress] = no_progress
    say: Callable[[str], None] = say_nothing

    def __post_init__(self) -> None:
        least = _LEAST_MEMORY * max(1, self.workers.n)
        if self.workers.memory < least:
            raise ValueError(
                f"--memory-budget {self.workers.memory // 2**20}MiB is too small for {max(1, self.workers.n)} process(es); give "
                f"at least {least // 2**20}MiB"
            )


def curate(
    store: str | Path,
    rules: recipe.Recipe,
    out: str | Path,
    options: CurateOptions | None = None,
    *,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Curate a store by a recipe and write the selection, with the audit and what rules draw beside it.

    store : address of a store of counts.  out : folder that does not exist yet, or is empty.

    Returns
    -------
    dict
        out, store, n_samples, n_val, n_genes (of the vocabulary), datasets (name, samples, samples_val, genes), steps (rule,
        samples_in, samples_out, genes_union_out), warnings, selection_sha256; of a dry run what would be read.

    Raises
    ------
    FileExistsError, FileNotFoundError, ValueError
        If a rule does not fit the store, nothing is left, or `out` is taken; nothing is written then.
    """
    options = options or CurateOptions()
    out = Path(out)
    opened = open_store(store)
    scratch = _check_folders(out, store, options.scratch)
    records = _datasets(opened, rules)
    _check(opened, rules, records)
    if dry_run:
        return _plan(opened, rules, records, out, options)
    state = State.of(opened, records)
    with scratch_folder(out, scratch) as folder:
        extras = folder / "extras"
        extras.mkdir()
        with pool(options.workers) as running:
            audit = _apply_all(state, rules, extras, running, options)
        kept = [record for record in records if state.n_samples(record)]
        _check_genes(state, kept, audit)
        if not kept:
            raise ValueError(
                f"{opened.path}: no sample is left after the last rule; nothing was written. " + _where_lost(audit)
            )

        def also(target: Path) -> None:
            write_audit(target, audit)
            for path in sorted(extras.iterdir()):
                shutil.copyfile(path, target / path.name)

        ids = np.flatnonzero(state.alive)
        selection = write_selection(
            out, opened, ids, {record.name: state.panels[record.name] for record in kept},
            None if state.is_val is None else state.is_val[ids], also=also,
        )  # fmt: skip
    return {
        "out": str(out), "store": opened.path, "n_samples": len(ids), "n_val": sum(d["samples_val"] for d in audit.result),
        "n_genes": audit.genes_union, "datasets": list(audit.result), "warnings": list(audit.warnings),
        "steps": [
            {
                "number": s.number, "rule": s.rule, "samples_in": s.samples_in, "samples_out": s.samples_out,
                "genes_union_out": s.genes_union_out,
            }
            for s in audit.steps
        ],
        "selection_sha256": selection.sha256,
    }  # fmt: skip


def _check_folders(out: Path, store: str | Path, scratch: str | Path | None) -> Path:
    """Refuse, before any work, folders that could not be written to or would harm what is there; returns that of the scratch."""
    for name, folder in (("the selection", out), ("--scratch", scratch)):
        if folder is not None and (is_remote(folder) or str(folder).startswith(_REMOTE)):
            raise ValueError(f"{folder}: {name} is written to a local folder; name one")
    check_new_selection(out)
    chosen = out.parent if scratch is None else Path(scratch)
    target = out.resolve()
    for name, folder in (("the selection", target), ("--scratch", chosen.resolve())):
        if not is_remote(store):
            inside = local_path(store).resolve()
            if inside == folder or (inside in folder.parents):
                raise ValueError(
                    f"{folder}: {name} would lie in the store {store}, which holds nothing else; name another folder"
                )
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing if existing != target else target.parent, os.W_OK):
            raise PermissionError(f"{folder}: {name} cannot be written there; name a folder that you may write to")
    if chosen.resolve() == target or target in chosen.resolve().parents:
        raise ValueError(f"{chosen}: --scratch would lie in the selection {out}; name another folder")
    return chosen


def _datasets(store: Store, rules: recipe.Recipe) -> tuple[DatasetRecord, ...]:
    """Datasets of the curation, in the order of the store."""
    if not store.datasets:
        raise ValueError(f"{store.path}: holds no dataset yet; ingest one first")
    if store.values != "counts":
        raise ValueError(f"{store.path}: holds {store.values} values; a curation needs raw counts")
    names = [record.name for record in store.datasets]
    if rules.datasets is not None:
        _known(rules.datasets, names, f"{store.path}: datasets of the recipe")
    return tuple(r for r in store.datasets if rules.datasets is None or r.name in rules.datasets)


def _known(wanted: Sequence[str], names: Sequence[str], where: str) -> None:
    for name in wanted:
        if name not in names:
            near = nearest(name, names) or sorted(names)[:5]
            raise ValueError(f"{where}: there is no dataset {name!r} among {len(names)}; near it: {near}")


def _of_rule(rule: recipe.Rule, records: Sequence[DatasetRecord]) -> tuple[DatasetRecord, ...]:
    """Datasets that a rule applies to: those it names, or all of its modality."""
    if rule.datasets is not None:
        return tuple(record for record in records if record.name in rule.datasets)
    return tuple(record for record in records if rule.scope in ("any", record.modality))


def _check(store: Store, rules: recipe.Recipe, records: tuple[DatasetRecord, ...]) -> None:
    """Refuse what no rule could do, before any is applied."""
    names = [record.name for record in records]
    for number, rule in enumerate(rules.rules, start=1):
        if rule.datasets is not None:
            _known(rule.datasets, names, f"rule {number} ({rule.name})")
        check, concerned = CHECK.get(type(rule)), _of_rule(rule, records)
        if check is None or not concerned:
            continue
        try:
            check(rule, store, concerned)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"rule {number} ({rule.name}): {error}") from error
        except ValueError as error:
            raise ValueError(f"rule {number} ({rule.name}): {error}") from error


def _plan(
    store: Store, rules: recipe.Recipe, records: tuple[DatasetRecord, ...], out: Path, options: CurateOptions
) -> dict[str, Any]:
    """What a curation would do, as far as it can be told without counts."""
    steps = [
        {
            "number": number, "rule": rule.name, "datasets": [record.name for record in _of_rule(rule, records)],
            "samples": sum(record.n_obs for record in _of_rule(rule, records)),
        }
        for number, rule in enumerate(rules.rules, start=1)
    ]  # fmt: skip
    return {
        "dry_run": True, "store": store.path, "out": str(out), "n_samples": sum(record.n_obs for record in records),
        "datasets": [{"name": r.name, "samples": r.n_obs, "genes": r.n_panel} for r in records], "steps": steps,
        "memory_bytes": options.workers.memory, "bytes_of_selection": 9 * sum(record.n_obs for record in records),
    }  # fmt: skip


def _apply_all(state: State, rules: recipe.Recipe, extras: Path, running: Pool, options: CurateOptions) -> Audit:
    start = tuple(_size(state, record) for record in state.records)
    steps = []
    for number, rule in enumerate(rules.rules, start=1):
        with tempfile.TemporaryDirectory(prefix=f"rule-{number}-", dir=extras.parent) as scratch:
            context = Context(
                seed=rules.seed, number=number, pool=running, n_workers=max(1, options.workers.n), scratch=Path(scratch),
                extras=extras, memory=options.workers.memory - _RESERVED, embed=options.embed, progress=options.progress,
                say=options.say,
            )  # fmt: skip
            step = _apply(rule, state, context)
        for text in step.warnings:
            options.say(f"WARNING: rule {number} ({rule.name}): {text}")
        options.say(
            f"rule {number} ({rule.name}): {step.samples_in:,} -> {step.samples_out:,} samples, vocabulary "
            f"{step.genes_union_in:,} -> {step.genes_union_out:,} genes"
        )
        steps.append(step)
    tree = rules.tree()
    text = json.dumps(tree, sort_keys=True)
    result = tuple(size for size in (_size(state, record) for record in state.records) if size["samples"])
    return Audit(
        store=tuple(
            {"name": r.name, "content_sha256": r.content_sha256, "obs_start": r.obs_start, "n_obs": r.n_obs}
            for r in state.records
        ),
        recipe=tree, recipe_sha256=hashlib.sha256(text.encode()).hexdigest(), start=start, steps=tuple(steps), result=result,
        genes_union=state.n_union(),
    )  # fmt: skip


def _size(state: State, record: DatasetRecord) -> dict[str, Any]:
    part = slice(record.obs_start, record.obs_stop)
    held = 0 if state.is_val is None else int(np.count_nonzero(state.alive[part] & state.is_val[part]))
    return {
        "name": record.name, "modality": record.modality, "samples": state.n_samples(record), "samples_val": held,
        "genes": len(state.panels[record.name]),
    }  # fmt: skip


def _apply(rule: recipe.Rule, state: State, context: Context) -> Step:
    """Apply one rule to the datasets that it concerns and that have samples, and say what it did."""
    records = tuple(record for record in _of_rule(rule, state.records) if state.n_samples(record))
    before, union = {r.name: (state.n_samples(r), len(state.panels[r.name])) for r in records}, state.n_union()
    n_val, untrained = _n_val(state), _all_held_out(state)
    details: Details = APPLY[type(rule)](rule, state, records, context) if records else {}
    steps = tuple(
        DatasetStep(
            dataset=r.name, samples_in=before[r.name][0], samples_out=state.n_samples(r), genes_in=before[r.name][1],
            genes_out=len(state.panels[r.name]), details=details.get(r.name, {}),
        )
        for r in records
    )  # fmt: skip
    step = Step(
        number=context.number, rule=rule.name, note=rule.note,
        parameters={k: v for k, v in to_tree(rule).items() if k != "note"}, datasets=steps, genes_union_in=union,
        genes_union_out=state.n_union(), samples_val=_n_val(state), warnings=(),
    )  # fmt: skip
    told = _warnings(rule, step, n_val)
    told += [
        f"leaves no sample of {name} to train on: all are held out"
        for name in _all_held_out(state)
        if name not in untrained
    ]
    if n_val and not step.samples_val:
        told.append("drops every sample that was held out: nothing is left to validate on")
    return replace(step, warnings=tuple(told))


def _all_held_out(state: State) -> list[str]:
    """Datasets whose samples are all held out."""
    sizes = [_size(state, record) for record in state.records]
    return [size["name"] for size in sizes if 0 < size["samples"] == size["samples_val"]]


def _n_val(state: State) -> int:
    return 0 if state.is_val is None else int(np.count_nonzero(state.alive & state.is_val))


def _warnings(rule: recipe.Rule, step: Step, n_val: int) -> list[str]:
    """A rule that keeps nothing or everything is seldom what was meant."""
    told = [f"{d.dataset}: {d.details['warning']}" for d in step.datasets if d.details.get("warning")]
    if not step.datasets:
        return [*told, "applies to no dataset that has samples left"]
    told += [f"keeps no sample of {d.dataset}" for d in step.datasets if d.samples_in and not d.samples_out]
    same_genes = all(d.genes_in == d.genes_out for d in step.datasets)
    same_samples = step.samples_in == step.samples_out
    if isinstance(rule, recipe.HoldOut):
        return [*told, "holds out nothing"] if step.samples_val == n_val else told
    if same_genes and same_samples:
        told.append("keeps everything" if not isinstance(rule, _NO_SAMPLES_LOST) else "keeps every gene")
    return told


def _check_genes(state: State, kept: list[DatasetRecord], audit: Audit) -> None:
    """Refuse datasets that have samples and no gene, naming the rule that took the last one."""
    for record in kept:
        if not len(state.panels[record.name]):
            rule = next(
                s
                for s in audit.steps
                for d in s.datasets
                if d.dataset == record.name and d.genes_in and not d.genes_out
            )
            raise ValueError(
                f"rule {rule.number} ({rule.rule}): leaves dataset {record.name!r} no gene, but no rule drops its "
                f"{state.n_samples(record):,} samples; lower the rule's bound, or leave the dataset out (datasets of the recipe)"
            )


def _where_lost(audit: Audit) -> str:
    for step in audit.steps:
        if step.samples_in and not step.samples_out:
            return f"Rule {step.number} ({step.rule}) keeps none of {step.samples_in:,} samples"
    return "See the rules' numbers above"
