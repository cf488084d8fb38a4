"""A recipe: the rules of a curation in their order, read from YAML and checked before anything else is."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from txfm_data.config_tree import did_you_mean, from_tree, to_tree

Label = str | int | float | bool
Scope = Literal["sc", "bulk", "any"]
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What all rules share.

    datasets : names of those it applies to; by default all of its modality.  note : why it is there; goes into the audit.
    """

    name: ClassVar[str]
    scope: ClassVar[Scope] = "any"

    datasets: tuple[str, ...] | None = None
    note: str = ""

    def _refuse(self, condition: bool, problem: str) -> None:
        if condition:
            raise ValueError(f"rule {self.name}: {problem}")


@dataclass(frozen=True, kw_only=True)
class GenesByCells(Rule):
    """Keep, in each dataset, the genes above zero in at least `min_cells` of its samples that are left.

    min_fraction : the same as a share of them, 0 to 1; the larger of the two counts.  Defaults: 1,000 cells (paper, B.1).
    """

    name = "genes_by_cells"
    scope = "sc"

    min_cells: int = 1_000
    min_fraction: float = 0.0

    def __post_init__(self) -> None:
        self._refuse(self.min_cells < 0, f"min_cells must not be negative, got {self.min_cells}")
        self._refuse(not 0 <= self.min_fraction <= 1, f"min_fraction must lie between 0 and 1, got {self.min_fraction}")


@dataclass(frozen=True, kw_only=True)
class CellsByGenes(Rule):
    """Keep the samples with at least `min_genes` (and at most `max_genes`) genes above zero, of those that are left.

    Default: 2,000 genes (paper, B.1).
    """

    name = "cells_by_genes"
    scope = "sc"

    min_genes: int = 2_000
    max_genes: int | None = None
    keep_controls: bool = False

    def __post_init__(self) -> None:
        self._refuse(self.min_genes < 0, f"min_genes must not be negative, got {self.min_genes}")
        self._refuse(
            self.max_genes is not None and self.max_genes < self.min_genes,
            f"max_genes {self.max_genes} is below min_genes {self.min_genes}",
        )


@dataclass(frozen=True, kw_only=True)
class FilterObs(Rule):
    """Keep the samples that a filter in the Census' language passes (`txfm_data.obs_filter`)."""

    name = "filter"

    where: str
    keep_controls: bool = False


@dataclass(frozen=True, kw_only=True)
class _ByLabel(Rule):
    """A rule on the values of one column of obs."""

    column: str
    values: tuple[Label, ...]
    keep_controls: bool = False

    def __post_init__(self) -> None:
        self._refuse(not self.values, f"values of {self.column!r} are empty; name at least one")
        self._refuse(
            any(isinstance(value, float) and not math.isfinite(value) for value in self.values),
            f"values of {self.column!r} hold NaN or infinity, which no label is; use a filter for what is missing",
        )


@dataclass(frozen=True, kw_only=True)
class Keep(_ByLabel):
    """Keep the samples whose `column` is one of `values`."""

    name = "keep"


@dataclass(frozen=True, kw_only=True)
class Drop(_ByLabel):
    """Drop the samples whose `column` is one of `values`."""

    name = "drop"


@dataclass(frozen=True, kw_only=True)
class Subsample(Rule):
    """Keep a random part of the samples of each value of `column`, drawn by `seed` and the sample's id alone.

    Each value is drawn from in each dataset for itself, and samples without a value all stay: two datasets that share a
    value may keep twice `max_samples` of it.

    fraction : share to keep of each value in each dataset, 0 to 1, at least one sample.  max_samples : most to keep of each
        value in each dataset.  One of the two.
    values : of the column whose samples are drawn from, as they are written there (of joined diseases the whole entry);
        samples of others all stay.  Default: all values.
    seed : by default the recipe's.
    """

    name = "subsample"

    column: str
    fraction: float | None = None
    max_samples: int | None = None
    values: tuple[Label, ...] = ()
    keep_controls: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        self._refuse(
            (self.fraction is None) == (self.max_samples is None), "give fraction or max_samples, one of the two"
        )
        self._refuse(
            self.fraction is not None and not 0 < self.fraction <= 1,
            f"fraction must lie in (0, 1], got {self.fraction}",
        )
        self._refuse(
            self.max_samples is not None and self.max_samples < 1,
            f"max_samples must be at least 1, got {self.max_samples}",
        )


@dataclass(frozen=True, kw_only=True)
class Cap(Rule):
    """Keep at most `max_samples` samples of each dataset, drawn by `seed` and the sample's id alone."""

    name = "cap"

    max_samples: int
    keep_controls: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        self._refuse(self.max_samples < 1, f"max_samples must be at least 1, got {self.max_samples}")


@dataclass(frozen=True, kw_only=True)
class HoldOut(Rule):
    """Hold out whole experimental batches of each dataset for validation, of those with samples left.

    share : of the batches, 0 to below 1, at least one and never all; chosen as `txfm shard --val-batches` does.
    batches : names of those to hold out instead. A name means the batch of that name in every dataset of the rule, also where
        several have one; `datasets` narrows it.
    seed : by default the recipe's.
    """

    name = "hold_out"

    share: float | None = None
    batches: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        self._refuse((self.share is None) == (not self.batches), "give share or batches, one of the two")
        self._refuse(self.share is not None and not 0 <= self.share < 1, f"share must lie in [0, 1), got {self.share}")


@dataclass(frozen=True, kw_only=True)
class Genes(Rule):
    """Say which genes of the datasets' panels make the vocabulary; without it, all of them do (their union).

    min_datasets : a gene must be measured in so many of the rule's datasets; 1 is the union.
    keep, drop : text files of Ensembl gene ids, one a line (versions are cut off); genes to keep, or to leave out. Ids that
        the store does not know are warned of, and are an error if it knows none.
    """

    name = "genes"

    min_datasets: int = 1
    keep: str | None = None
    drop: str | None = None

    def __post_init__(self) -> None:
        self._refuse(self.min_datasets < 1, f"min_datasets must be at least 1, got {self.min_datasets}")


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """What represents the cells when phenoprints are looked for.

    kind : "pca" of library-size-normalised log1p counts; "checkpoint", a TxFM model; "columns" of the store's obs; "file", an
        h5ad that `txfm embed STORE` wrote, whose samples are named by their row of the store.
    n_components : of the PCA.  path : of the checkpoint (default: the one of --model) or of the file.  key : of obsm in the file.
    prefix : of the names of the columns; all numeric columns that begin with it, in the order of the number behind it.
    layer, n_unmasked, batch_size : of a checkpoint, as in `txfm embed`.
    """

    kind: Literal["pca", "checkpoint", "columns", "file"]
    n_components: int = 50
    path: str | None = None
    key: str = "X_txfm"
    prefix: str | None = None
    layer: str = "final"
    n_unmasked: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        own = {
            "pca": {"n_components"}, "checkpoint": {"path", "layer", "n_unmasked", "batch_size"}, "columns": {"prefix"},
            "file": {"path", "key"},
        }[self.kind]  # fmt: skip
        for field in dataclasses.fields(self):
            if field.name != "kind" and field.name not in own and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"embedding: {field.name} does not go with kind {self.kind!r}, which knows {sorted(own)}; leave it out"
                )
        for name in ("n_components", "batch_size", "n_unmasked"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"embedding: {name} must be at least 1, got {value}")
        if self.kind == "columns" and not self.prefix:
            raise ValueError("embedding: kind 'columns' needs prefix, the beginning of the columns' names")
        if self.kind == "file" and not self.path:
            raise ValueError("embedding: kind 'file' needs path, an h5ad that txfm embed wrote of this store")


@dataclass(frozen=True, kw_only=True)
class Phenoprints(Rule):
    """Keep the perturbations whose cells are more alike than random cells are, and all controls (paper, B.1; spec B.4, D).

    embedding : of the cells.
    tau : keep perturbations with p below it (default 0.1).  calibrate_to : choose tau of `taus` instead so that the cells kept,
        controls included, come nearest to this number; further away than `tolerance` (a share) warns.
    min_cells : a perturbation with fewer cells to look at cannot be tested, and is dropped; of a few cells more pass by chance.
    null : compare each perturbation with random cells against its own mean ("per_perturbation"), or all with the pool.
    n_null : random cells, M.  null_controls : whether controls may be among them.
    reference : what each batch is standardised by: its controls, or all of its cells.
    batches : look at the samples that are not held out ("train"), or at all.
    unassigned : what becomes of cells that have neither a perturbation nor are controls.
    seed : of the random cells; by default the recipe's.
    """

    name = "phenoprints"
    scope = "sc"

    embedding: EmbeddingSpec
    tau: float | None = None
    calibrate_to: int | None = None
    taus: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    tolerance: float = 0.05
    min_cells: int = 2
    null: Literal["per_perturbation", "pooled"] = "per_perturbation"
    n_null: int = 1_000
    null_controls: bool = False
    reference: Literal["controls", "all"] = "controls"
    batches: Literal["train", "all"] = "train"
    unassigned: Literal["drop", "keep"] = "drop"
    seed: int | None = None

    def __post_init__(self) -> None:
        self._refuse(self.tau is not None and self.calibrate_to is not None, "give tau or calibrate_to, one of the two")
        for tau in (*self.taus, *(() if self.tau is None else (self.tau,))):
            self._refuse(not 0 < tau <= 1, f"tau must lie in (0, 1], got {tau}")
        self._refuse(not self.taus, "taus are empty")
        self._refuse(self.calibrate_to is not None and self.calibrate_to < 1, "calibrate_to must be at least 1")
        self._refuse(not 0 <= self.tolerance < 1, f"tolerance must lie in [0, 1), got {self.tolerance}")
        self._refuse(self.min_cells < 2, f"min_cells must be at least 2, got {self.min_cells}")
        self._refuse(self.n_null < 20, f"n_null must be at least 20, got {self.n_null}")


RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (GenesByCells, CellsByGenes, FilterObs, Keep, Drop, Subsample, Cap, HoldOut, Genes, Phenoprints)
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Rules in their order.

    rules : applied one after the other, each to what the one before left.
    datasets : of the store to take; all of them if None.  seed : of every random choice.
    """

    rules: tuple[Rule, ...]
    datasets: tuple[str, ...] | None = None
    seed: int = 0

    def tree(self) -> dict[str, Any]:
        """The recipe as YAML would state it, every default included."""
        rules = [{"rule": rule.name} | to_tree(rule) for rule in self.rules]
        return {"seed": self.seed, "datasets": None if self.datasets is None else list(self.datasets), "rules": rules}


def with_model(recipe: Recipe, model: str | None) -> Recipe:
    """The recipe with `model` as the checkpoint of every embedding that names none.

    Raises
    ------
    ValueError
        If a checkpoint is missing, or `model` is given and no rule wants it.
    """
    rules, n_filled = [], 0
    for number, rule in enumerate(recipe.rules, start=1):
        if isinstance(rule, Phenoprints) and rule.embedding.kind == "checkpoint" and rule.embedding.path is None:
            if model is None:
                raise ValueError(
                    f"rule {number} ({rule.name}): embeds with a checkpoint and names none; give --model, or path"
                )
            rule, n_filled = replace(rule, embedding=replace(rule.embedding, path=model)), n_filled + 1
        rules.append(rule)
    if model is not None and not n_filled:
        raise ValueError("--model is given, but no rule of the recipe embeds with a checkpoint that it leaves open")
    return replace(recipe, rules=tuple(rules))


def parse_recipe(tree: Mapping[str, Any], where: str) -> Recipe:
    """Read a recipe from what YAML gave.

    where : what to call it in errors.

    Raises
    ------
    ValueError, TypeError
        On an unknown key, rule or parameter (the near ones are named), or a value that it cannot have.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"{where}: expected a recipe with the key rules, got {type(tree).__name__}")
    for key in tree:
        if key not in ("seed", "datasets", "rules"):
            raise ValueError(f"{where}: unknown key {key!r}; {did_you_mean(str(key), ('seed', 'datasets', 'rules'))}")
    listed = tree.get("rules")
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise ValueError(f"{where}: rules must be a list of at least one rule, such as - rule: genes_by_cells")
    rules = tuple(_rule(entry, f"{where}: rule {number}") for number, entry in enumerate(listed, start=1))
    seed, datasets = tree.get("seed", 0), tree.get("datasets")
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"{where}: seed must be a whole number from 0 to 2^63 - 1, got {seed!r}")
    if datasets is not None and (
        not datasets
        or not isinstance(datasets, Sequence)
        or isinstance(datasets, str)
        or not all(type(d) is str for d in datasets)
    ):
        raise ValueError(f"{where}: datasets must be a list of at least one name, got {datasets!r}")
    return Recipe(rules=rules, datasets=None if datasets is None else tuple(datasets), seed=seed)


def _rule(entry: Any, where: str) -> Rule:
    if not isinstance(entry, Mapping) or "rule" not in entry:
        raise ValueError(f"{where}: expected a mapping with the key rule, such as rule: genes_by_cells; got {entry!r}")
    name = entry["rule"]
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"{where}: there is no rule {name!r}; {did_you_mean(str(name), RULES)}")
    parameters = {key: value for key, value in entry.items() if key != "rule"}
    try:
        rule = from_tree(RULES[name], parameters)
        if rule.datasets is not None and not rule.datasets:
            raise ValueError(f"rule {name}: datasets are empty; name at least one, or leave datasets out to mean all")
        seed = getattr(rule, "seed", None)
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise ValueError(f"rule {name}: seed must be a whole number from 0 to 2^63 - 1, got {seed}")
        return rule
    except (ValueError, TypeError) as error:
        said = str(error)
        raise type(error)(f"{where}: {said}" if said.startswith("rule ") else f"{where} ({name}): {said}") from error


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file; see `parse_recipe`.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        If there is no such file, it is not YAML, or not a recipe.
    """
    from txfm_data.yaml_file import read_yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; name a YAML file with the key rules")
    return parse_recipe(read_yaml(path), str(path))
