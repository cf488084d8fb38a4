"""Rules on labels: filters, draws of samples, batches to hold out, and which genes make the vocabulary. They read no counts.

A rule's `check_…` is asked before any rule is applied, about the whole datasets; `apply_…` changes the state.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from txfm_data import obs_filter
from txfm_data.curate import recipe
from txfm_data.curate.labels import (
    MOST_VALUES,
    check_label,
    kind_of,
    read_codes,
    read_controls,
    read_mask,
    values_among,
)
from txfm_data.curate.state import Context, Details, State
from txfm_data.hold_out import hold_out
from txfm_data.random_order import count_values, draw_samples
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store
from txfm_data.vocabulary import strip_version

Records = tuple[DatasetRecord, ...]

_NAMED = 20
"""Batches that the details name; of more, the first."""
_GENES_NAMED = 5
"""Genes that a warning names; of more, the first."""


# --- filter, keep, drop ----------------------------------------------------------------------------------------------


def apply_filter(rule: recipe.FilterObs, state: State, records: Records, context: Context) -> Details:
    """Keep the samples that pass the filter; a null does not pass. A disease is found in cells that have several, too."""
    passes = _passes(obs_filter.parse(rule.where, "where"), state.store, records)
    return _keep(passes, rule.keep_controls, state, records)


def check_filter(rule: recipe.FilterObs, store: Store, records: Records) -> None:
    """Refuse what is no filter, unknown columns, and texts that no sample of the datasets has.

    Numbers and booleans are compared as quantities, which need not occur.

    Raises
    ------
    ValueError
        Names the near ones.
    """
    parsed = obs_filter.parse(rule.where, "where")

    def values_of(column: str) -> Collection[obs_filter.Value] | None:
        if kind_of(store, column) != "text":
            return None
        return _occurring(store, column, parsed.literals[column], records, with_terms=True)

    obs_filter.check(parsed, store.obs_schema(), values_of, "where")


def apply_keep(rule: recipe.Keep, state: State, records: Records, context: Context) -> Details:
    """Keep the samples whose label is one of the values; a null is none of them. Diseases are found as by `apply_filter`."""
    is_named = _passes(obs_filter.is_in(rule.column, rule.values), state.store, records)
    return _keep(is_named, rule.keep_controls, state, records)


def apply_drop(rule: recipe.Drop, state: State, records: Records, context: Context) -> Details:
    """Drop the samples whose label is one of the values; a null stays. Diseases are found as by `apply_filter`."""
    is_named = _passes(obs_filter.is_in(rule.column, rule.values), state.store, records)
    return _keep(np.logical_not(is_named, out=is_named), rule.keep_controls, state, records)


def check_keep(rule: recipe.Keep, store: Store, records: Records) -> None:
    """Refuse an unknown column, values of another type than it holds, and values that no sample of the datasets has.

    Raises
    ------
    ValueError
        Names the near ones.
    """
    _check_values(rule.column, rule.values, store, records, with_terms=True)


def check_drop(rule: recipe.Drop, store: Store, records: Records) -> None:
    """As `check_keep`."""
    _check_values(rule.column, rule.values, store, records, with_terms=True)


def _passes(filter_: obs_filter.Filter, store: Store, records: Records) -> np.ndarray:
    """Which samples pass, (store.n_obs,) bool; of the datasets also those whose disease joins a wanted term with others."""
    if obs_filter.MULTIVALUED in filter_.literals and kind_of(store, obs_filter.MULTIVALUED) == "text":
        filter_ = obs_filter.expand_multivalued(filter_, obs_filter.MULTIVALUED, _joined(store, records))
    return read_mask(store, filter_)


def _joined(store: Store, records: Records) -> set[str]:
    """Entries of the multivalued column in the datasets, each of which may join several terms.

    Raises
    ------
    ValueError
        If there are too many to hold: a term would not be found in all of them.
    """
    found = values_among(store, obs_filter.MULTIVALUED, records)
    if found is None:
        raise ValueError(
            f"{store.path}: column {obs_filter.MULTIVALUED!r} of obs has more than {MOST_VALUES:,} values in the rule's datasets, "
            "too many to look for terms that are joined in one; apply the rule to fewer datasets, or name another column"
        )
    return {str(value) for value in found}


def _keep(stays: np.ndarray, keep_controls: bool, state: State, records: Records) -> Details:
    """Keep of the datasets' samples those that stay, and the controls if they pass anyway."""
    controls = read_controls(state.store) if keep_controls else None
    details: Details = {}
    for record in records:
        part = slice(record.obs_start, record.obs_stop)
        if controls is not None:
            saved = state.alive[part] & controls[part] & ~stays[part]
            details[record.name] = {"controls_kept_anyway": int(np.count_nonzero(saved))}
            stays[part] |= controls[part]
        state.alive[part] &= stays[part]
    return details


def _check_values(
    column: str, values: Collection[recipe.Label], store: Store, records: Records, *, with_terms: bool = False
) -> None:
    """Refuse an unknown column, and values that are of another type or that no sample of the datasets has."""
    check_label(store, column)
    obs_filter.check(
        obs_filter.is_in(column, values),
        store.obs_schema(),
        lambda name: _occurring(store, name, values, records, with_terms=with_terms),
        "values",
    )


def _occurring(
    store: Store, column: str, values: Collection[recipe.Label], records: Records, *, with_terms: bool
) -> Collection[recipe.Label]:
    """Values of a column that occur in the datasets: those asked about if all of them do, else all, to name the near ones.

    Of a column of identifiers, which may be more than fit in memory, it is those asked about in either case.

    with_terms : of the multivalued column also the terms that its values join.
    """
    if with_terms and column == obs_filter.MULTIVALUED and kind_of(store, column) == "text":
        joined = _joined(store, records)
        return {*joined, *(term for value in joined for term in value.split(obs_filter.MULTIVALUE_SEPARATOR))}
    found = values_among(store, column, records, of=obs_filter.is_in(column, values), most=len(values)) or set()
    if found.issuperset(values):
        return found
    every = values_among(store, column, records)
    return found if every is None else every


# --- draws -----------------------------------------------------------------------------------------------------------


def apply_subsample(rule: recipe.Subsample, state: State, records: Records, context: Context) -> Details:
    """Keep a random part of the samples of each value, within each dataset; of a value that has some, at least one.

    A sample without a value is not drawn from: it stays, as those of other values do.
    """
    labels = read_codes(state.store, rule.column)
    chosen = set(rule.values or labels.values)
    is_chosen = np.array([value in chosen for value in labels.values], bool)
    controls = _controls(rule, state)
    details: Details = {}
    for record in records:
        part = slice(record.obs_start, record.obs_stop)
        codes, has_value = labels.codes[part], labels.codes[part] >= 0
        n_without = int(np.count_nonzero(state.alive[part] & ~has_value))
        may_go = _may_go(state, record, controls)
        may_go &= has_value
        sizes = count_values(codes, may_go, len(is_chosen))
        quota = np.where(is_chosen, _quota(rule, sizes), sizes)  # of other values all stay
        _draw(state, record, codes, may_go, quota, _seed(rule.seed, context), context.number)
        details[record.name] = {
            "values_drawn_from": int(np.count_nonzero(sizes[is_chosen])), "samples_drawn_from": int(sizes[is_chosen].sum()),
            "samples_kept": int(quota[is_chosen].sum()), "samples_without_value": n_without,
        }  # fmt: skip
    return details


def check_subsample(rule: recipe.Subsample, store: Store, records: Records) -> None:
    """Refuse a column that holds no labels or too many, and values that no sample of the datasets has.

    Raises
    ------
    ValueError
        Names the near ones.
    """
    if rule.values:
        _check_values(rule.column, rule.values, store, records)
    read_codes(store, rule.column)


def apply_cap(rule: recipe.Cap, state: State, records: Records, context: Context) -> Details:
    """Keep at most so many samples of each dataset; controls that stay anyway are not counted."""
    controls = _controls(rule, state)
    details: Details = {}
    for record in records:
        may_go = _may_go(state, record, controls)
        n, one_value = int(np.count_nonzero(may_go)), np.zeros(record.n_obs, np.int32)
        kept = min(n, rule.max_samples)
        _draw(state, record, one_value, may_go, np.array([kept]), _seed(rule.seed, context), context.number)
        details[record.name] = {"samples_drawn_from": n, "samples_kept": kept}
    return details


def _controls(rule: recipe.Subsample | recipe.Cap, state: State) -> np.ndarray | None:
    return read_controls(state.store) if rule.keep_controls else None


def _seed(seed: int | None, context: Context) -> int:
    return context.seed if seed is None else seed


def _quota(rule: recipe.Subsample, sizes: np.ndarray) -> np.ndarray:
    """How many samples of each value to keep, of so many: (n_values,) int64."""
    wanted = np.full(len(sizes), rule.max_samples or 0)
    if rule.fraction is not None:
        wanted = np.maximum(1, np.rint(rule.fraction * sizes).astype(np.int64))
    least: np.ndarray = np.minimum(sizes, wanted)
    return least


def _may_go(state: State, record: DatasetRecord, controls: np.ndarray | None) -> np.ndarray:
    """Samples of a dataset that are left and not among the controls that stay: (record.n_obs,) bool."""
    part = slice(record.obs_start, record.obs_stop)
    may_go: np.ndarray = state.alive[part].copy() if controls is None else state.alive[part] & ~controls[part]
    return may_go


def _draw(
    state: State,
    record: DatasetRecord,
    codes: np.ndarray,
    may_go: np.ndarray,
    quota: np.ndarray,
    seed: int,
    number: int,
) -> None:
    """Drop, of the samples of a dataset that may go, those that are not drawn (`draw_samples`)."""
    stays = draw_samples(record.obs_start, codes, may_go, quota, seed=seed, number=number)
    np.logical_or(stays, ~may_go, out=stays)
    state.alive[record.obs_start : record.obs_stop] &= stays


# --- hold out --------------------------------------------------------------------------------------------------------


def apply_hold_out(rule: recipe.HoldOut, state: State, records: Records, context: Context) -> Details:
    """Hold out batches of each dataset besides those that are held out already.

    With a share, it holds out the samples that `txfm shard --val-batches` would of the same samples and seed; of a dataset of one
    batch these are single samples.

    Raises
    ------
    ValueError
        If a sample has no batch, or a dataset would have nothing left to train on.
    """
    labels = read_codes(state.store, "batch")
    details: Details = {}
    names = [str(value) for value in labels.values]
    is_named = np.array([name in rule.batches for name in names], bool)
    is_val = np.zeros(state.store.n_obs, bool) if state.is_val is None else state.is_val.copy()
    for record in records:
        rows = state.rows(record)
        codes = labels.codes[rows]
        where = f"rule {context.number} ({rule.name}): dataset {record.name!r}"
        if (codes < 0).any():
            raise ValueError(
                f"{where}: sample {rows[int(np.argmin(codes))]} has no batch ({int((codes < 0).sum())} such); ingest the dataset "
                "with --batch, or drop these samples first"
            )
        if rule.share is None:
            held, by = is_named[codes], "batches"
            chosen = tuple(names[code] for code in np.unique(codes[held]).tolist())
        else:
            held, by, chosen = hold_out(codes, names, share=rule.share, seed=_seed(rule.seed, context))
        is_val[rows] |= held
        if len(rows) and is_val[rows].all():
            raise ValueError(
                f"{where}: all of its {len(rows)} samples would be held out, and none be left to train on; hold out fewer batches, "
                "or leave it out of the rule's datasets"
            )
        details[record.name] = {
            "by": by if held.any() else "none", "samples_held_out": int(held.sum()), "batches_held_out": len(chosen),
            "batches": list(chosen[:_NAMED]),
        }  # fmt: skip
    state.is_val = is_val
    return details


def check_hold_out(rule: recipe.HoldOut, store: Store, records: Records) -> None:
    """Refuse batches that no sample of the datasets has.

    Raises
    ------
    ValueError
        Names the near ones.
    """
    if rule.batches:
        _check_values("batch", rule.batches, store, records)


# --- genes -----------------------------------------------------------------------------------------------------------


def apply_genes(rule: recipe.Genes, state: State, records: Records, context: Context) -> Details:
    """Leave in each dataset's panel the genes of the vocabulary that the rule describes.

    Genes of the files that the store does not know have no effect; the details count them and a warning names the first.

    Raises
    ------
    ValueError
        If a dataset would be left without genes.
    FileNotFoundError
        If there is no such file of genes.
    """
    n_datasets = np.zeros(len(state.store.vocabulary), np.int64)
    for record in records:
        n_datasets[state.panels[record.name]] += 1
    stays = n_datasets >= rule.min_datasets
    found: dict[str, dict[str, int]] = {}
    told: list[str] = []
    for name, path in (("keep", rule.keep), ("drop", rule.drop)):
        if path is None:
            continue
        listed, n_genes, unknown = _listed(state.store, path, name)
        stays &= listed if name == "keep" else ~listed
        found[f"{name}_file"] = {"genes": n_genes, "unknown": len(unknown)}
        if unknown:
            more = ", …" if len(unknown) > _GENES_NAMED else ""
            told.append(f"{name}: {path}: the store does not know {len(unknown):,} of its {n_genes:,} genes: "
                        f"{', '.join(unknown[:_GENES_NAMED])}{more}")  # fmt: skip
    panels = {record.name: _panel(state, record, stays, len(records), rule, context) for record in records}
    state.panels.update(panels)
    details: Details = {record.name: dict(found) for record in records} if found else {}
    if told:  # of the first dataset alone: it is one file for all of them, and is told of once
        details[records[0].name]["warning"] = "; ".join(told)
    return details


def _panel(
    state: State, record: DatasetRecord, stays: np.ndarray, n_datasets: int, rule: recipe.Genes, context: Context
) -> np.ndarray:
    before = state.panels[record.name]
    panel: np.ndarray = before[stays[before]]
    if not len(panel):
        raise ValueError(
            f"rule {context.number} ({rule.name}): none of the {len(before)} genes of dataset {record.name!r} would be left "
            f"(min_datasets {rule.min_datasets} of {n_datasets}, keep {rule.keep}, drop {rule.drop}); change these, or the rule's "
            "datasets"
        )
    return panel


def check_genes(rule: recipe.Genes, store: Store, records: Records) -> None:
    """Refuse more datasets than there are, and files that name no gene of the store.

    Raises
    ------
    ValueError
        Names the near genes.
    FileNotFoundError
        If there is no such file.
    """
    if rule.min_datasets > len(records):
        raise ValueError(
            f"min_datasets is {rule.min_datasets}, but the rule applies to {len(records)} datasets: {[r.name for r in records]}"
        )
    for name, path in (("keep", rule.keep), ("drop", rule.drop)):
        if path is not None:
            _listed(store, path, name)


def _listed(store: Store, path: str, name: str) -> tuple[np.ndarray, int, list[str]]:
    """Which genes of the store a file names, (G,) bool, how many it names, and those of them that the store does not know."""
    genes = list(dict.fromkeys(strip_version(gene) for gene in _read_genes(path, name)))
    tokens = store.vocabulary.index_of(genes)
    if (tokens < 0).all():
        raise ValueError(f"{name}: {path}: the store has none of the {len(genes)} genes; {_near_genes(store, genes)}")
    listed = np.zeros(len(store.vocabulary), bool)
    listed[tokens[tokens >= 0]] = True
    return listed, len(genes), [genes[at] for at in np.flatnonzero(tokens < 0).tolist()]


def _read_genes(path: str, name: str) -> list[str]:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{name}: {path}: no such file; give a text file with one Ensembl gene id a line")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path}: not text ({error.reason}); write one Ensembl gene id a line") from error
    genes = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if len(words) > 1:
            raise ValueError(f"{name}: {path}: line {number} holds {words[:3]}; write one Ensembl gene id a line")
        genes += words
    if not genes:
        raise ValueError(f"{name}: {path}: names no gene; write one Ensembl gene id a line")
    return genes


def _near_genes(store: Store, genes: list[str]) -> str:
    """What to write in place of genes of which none is known."""
    known = store.vocabulary
    by_symbol = known.index_of_symbols(genes)
    there = np.flatnonzero(by_symbol >= 0)[:3].tolist()
    if there:
        pairs = ", ".join(f"{genes[i]} is {known.gene_ids[by_symbol[i]]}" for i in there)
        return f"write Ensembl ids in place of symbols: {pairs}"
    near = obs_filter.nearest(genes[0], known.gene_ids) or list(known.gene_ids[:3])
    return f"near {genes[0]!r} of {len(known)}: {near}"
