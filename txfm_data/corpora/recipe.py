"""A corpus file: its datasets with their sources, what is known about each, the curation, and variants that change a part."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from txfm_data.config_tree import did_you_mean, from_tree
from txfm_data.corpora.entries import CENSUS, check_entry
from txfm_data.corpora.fields import check_known, check_relative, mapping, text, texts, whole_number
from txfm_data.curate.recipe import Recipe, parse_recipe
from txfm_data.ingest.kinds import BULK_KINDS
from txfm_data.yaml_file import read_yaml

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "corpora"
"""Where the corpora of this project lie in a checkout; an installed package has none."""
GeneIds = Literal["ensembl", "ensembl_version", "symbol", "unknown"]
IDENTITY = "identity"
"""Field that says whether the paper used just this source; all others are about the source itself."""
_WHOLE = ("name", "title", "description", "citation", "datasets", "curation", "shard", "expected", "epochs", "notes")
_VARIANT = (
    "name", "title", "description", "citation", "base", "keep_datasets", "drop_datasets", "replace_rules", "shard", "expected",
    "expected_datasets", "epochs", "notes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file, or folder, that must lie below the folder of sources.

    path : relative to it.  what : it is.  url : where it can be had, if known.
    bytes, md5, sha256 : of the file, where somebody has stated them.
    """

    path: str
    what: str
    url: str | None = None
    bytes: int | None = None
    md5: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_relative(self.path, "path of a source file")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a dataset comes from.

    accession : in a public archive.  portal : page that offers it.
    matrix : how an h5ad stores its counts, if known: it decides how large the file is, not how it is read.
    """

    accession: str | None = None
    portal: str | None = None
    matrix: Literal["dense", "csr"] | None = None
    files: tuple[SourceFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Sizes that the paper, or whoever published the data, states; None where nobody does.

    samples, genes : after curation.  source_samples, source_genes : of the source itself.
    within : how far from `samples` the true number may be, where a rounded one was stated.
    of : which samples that number counts: all that are left, or those to train on alone.
    """

    samples: int | None = None
    genes: int | None = None
    source_samples: int | None = None
    source_genes: int | None = None
    within: int = 0
    of: Literal["all", "train"] = "all"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What shows that some fields of a dataset are right: of the source, or with `IDENTITY` that the paper used it."""

    fields: tuple[str, ...]
    by: str


@dataclass(frozen=True, kw_only=True)
class Unverified:
    """A field of a dataset that nothing shows to be right, and what is known about it."""

    field: str
    note: str


@dataclass(frozen=True, kw_only=True)
class CorpusDataset:
    """One dataset of a corpus.

    name : in the store.  title : a person's name for it.
    ingest : an entry as `txfm ingest list` takes it, without the dataset's name; paths are relative to the folder of sources.
        Kind "census" takes the options of `txfm ingest census` and gives one dataset of the store for each of the Census.
    gene_ids : kind of the source's gene ids.
    evidence, unverified : which fields are shown to be right, and which are not.  candidates : what it may be, if that is open.
    """

    name: str
    title: str
    source: Source = field(default_factory=Source)
    ingest: Mapping[str, Any]
    gene_ids: GeneIds = "unknown"
    expected: Expected = field(default_factory=Expected)
    evidence: tuple[Evidence, ...] = ()
    unverified: tuple[Unverified, ...] = ()
    candidates: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Kind of the source: one of `entries.KINDS`."""
        return str(self.ingest["kind"])

    @property
    def modality(self) -> str:
        """Single cells ("sc") or profiles ("bulk")."""
        return str(self.ingest.get("modality", "bulk" if self.kind in BULK_KINDS else "sc"))

    def facts(self) -> dict[str, Any]:
        """The fields that somebody must know from the source, with their values; those not given are left out."""
        labels = {
            key: self.ingest.get(key) for key in ("kind", "values", "batch", "perturbation", "control", "cell_type")
        }
        sizes = {key: getattr(self.expected, key) for key in ("samples", "genes", "source_samples", "source_genes")}
        whole = {
            IDENTITY: self.title, "source.accession": self.source.accession, "source.files": self.source.files or None,
            "gene_ids": None if self.gene_ids == "unknown" else self.gene_ids,
        }  # fmt: skip
        found = whole | {f"ingest.{k}": v for k, v in labels.items()} | {f"expected.{k}": v for k, v in sizes.items()}
        return {key: value for key, value in found.items() if value is not None}

    def open_facts(self) -> dict[str, str]:
        """Fields that are not shown to be right, with a note; a field without any statement counts among them."""
        noted = {entry.field: entry.note for entry in self.unverified}
        shown = {name for entry in self.evidence for name in entry.fields}
        silent = {name: "no evidence given" for name in self.facts() if name not in shown and name not in noted}
        return noted | silent


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus: datasets, curation, and what is expected of the whole.

    curation : rules over the datasets, which it names.  shard : options of `txfm shard` besides paths and workers.
    expected : samples and genes (of the union) of all datasets together.  epochs : that training takes, where it was stated.
    """

    name: str
    title: str
    description: str
    citation: str
    datasets: tuple[CorpusDataset, ...]
    curation: Recipe
    shard: Mapping[str, Any] = field(default_factory=dict)
    expected: Expected = field(default_factory=Expected)
    epochs: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_census(self) -> bool:
        """Whether datasets of the store are not known by name before the Census is read."""
        return any(dataset.kind == CENSUS for dataset in self.datasets)

    def dataset(self, name: str) -> CorpusDataset:
        """One dataset by name; ValueError naming the near ones if there is none."""
        for dataset in self.datasets:
            if dataset.name == name:
                return dataset
        raise ValueError(
            f"corpus {self.name}: no dataset {name!r}; {did_you_mean(name, [d.name for d in self.datasets])}"
        )

    def only(self, names: Sequence[str]) -> "Corpus":
        """The same corpus with some of its datasets, in its order, and the curation of those; of a part no size is expected.

        Raises
        ------
        ValueError
            If it has no such dataset, or its curation takes none of them.
        """
        for name in names:
            self.dataset(name)
        kept = tuple(dataset for dataset in self.datasets if dataset.name in names)
        without = {dataset.name for dataset in self.datasets} - {dataset.name for dataset in kept}
        expected = self.expected if kept == self.datasets else Expected()
        return replace(self, datasets=kept, curation=restricted(self.curation, without), expected=expected)

    def with_curation(self, curation: Recipe) -> "Corpus":
        """The same corpus with other rules; ValueError if they, or one of them, name a dataset that the corpus has not got."""
        if not self.is_census:
            named = [*(curation.datasets or ()), *(name for rule in curation.rules for name in rule.datasets or ())]
            for name in named:
                self.dataset(name)
        return replace(self, curation=curation)

    def taken(self) -> "Corpus":
        """The corpus without the datasets that its curation does not take; the Census' are known only once it is read."""
        return self if self.curation.datasets is None or self.is_census else self.only(self.curation.datasets)


def restricted(curation: Recipe, without: Collection[str]) -> Recipe:
    """What is left of a curation when some datasets are not there: a rule for none but those falls away.

    Raises
    ------
    ValueError
        If it takes none but those.
    """
    left = _left(curation.datasets, without)
    if left == ():
        raise ValueError(
            f"the curation takes the datasets {', '.join(curation.datasets or ())} alone, and none of them is among those asked "
            "for; ask for one of them, or change datasets in the recipe"
        )
    rules = [replace(rule, datasets=_left(rule.datasets, without)) for rule in curation.rules]
    return replace(curation, datasets=left, rules=tuple(rule for rule in rules if rule.datasets != ()))


def _left(names: tuple[str, ...] | None, without: Collection[str]) -> tuple[str, ...] | None:
    return None if names is None else tuple(name for name in names if name not in without)


def corpus_names() -> list[str]:
    """Names of the corpora of this project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_corpus(name: str | Path) -> Corpus:
    """Read a corpus by its name, or from a YAML file.

    Raises
    ------
    FileNotFoundError
        If there is neither; the near names are given, and the folder that was looked in.
    ValueError, TypeError
        If it is no corpus: an unknown key, a missing one, or a value it cannot have.
    """
    path = _path_of(name)
    tree = _load(path)
    return _variant(tree, path) if "base" in tree else parse_corpus(tree, str(path))


def _path_of(name: str | Path, beside: Path | None = None) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    for folder in (FOLDER if beside is None else beside, FOLDER):
        if (found := folder / f"{name}.yaml").is_file():
            return found
    known = corpus_names()
    near = (
        f"; {did_you_mean(str(name), known)}"
        if known
        else ", which holds none: an installed package brings no corpora."
    )
    raise FileNotFoundError(f"{name}: no such corpus in {FOLDER}{near} Or give the path of a YAML file")


def _load(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise TypeError(f"{path}: expected a corpus with keys such as name and datasets, got {type(tree).__name__}")
    return tree


def _variant(change: dict[str, Any], path: Path) -> Corpus:
    """A base with the changes of a variant: fewer datasets, other rules, other expectations."""
    where = str(path)
    check_known(change, _VARIANT, where)
    base_path = _path_of(text(change, "base", where), path.parent)
    tree = _load(base_path)
    if "base" in tree:
        raise ValueError(
            f"{where}: its base {change['base']!r} is a variant itself; name the corpus that it is a variant of"
        )
    names = [dataset.name for dataset in parse_corpus(tree, str(base_path)).datasets]
    kept = texts(change, "keep_datasets", where) if "keep_datasets" in change else tuple(names)
    dropped = texts(change, "drop_datasets", where)
    for name in (*kept, *dropped):
        if name not in names:
            raise ValueError(f"{where}: its base has no dataset {name!r}; {did_you_mean(name, names)}")
    left = [name for name in names if name in kept and name not in dropped]
    if not left:
        raise ValueError(f"{where}: leaves no dataset of its base; keep at least one")
    sizes = mapping(change, "expected_datasets", where)
    for name in sizes:
        if name not in left:
            raise ValueError(f"{where}: expected_datasets names {name!r}; {did_you_mean(name, left)}")
        stated = mapping(sizes, name, f"{where}: expected_datasets")
        entry = tree["datasets"][names.index(name)]
        tree["datasets"][names.index(name)] = entry | {"expected": entry.get("expected", {}) | stated}
    rules = _replaced(tree["curation"]["rules"], mapping(change, "replace_rules", where), where)
    tree |= {key: change[key] for key in _WHOLE if key in change} | {
        "curation": tree["curation"] | {"rules": rules}, "expected": change.get("expected", {}),
        "shard": tree.get("shard", {}) | mapping(change, "shard", where),
    }  # fmt: skip
    corpus = parse_corpus(tree, where)
    return replace(corpus.only(left), expected=corpus.expected)


def _replaced(rules: list[dict[str, Any]], changes: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Rules with those of some names replaced by others, or by none; a name must stand for one rule."""
    named = [str(rule["rule"]) for rule in rules]
    for name, new in changes.items():
        if named.count(name) != 1:
            raise ValueError(
                f"{where}: replace_rules names {name!r}, which occurs {named.count(name)} times among the rules of its base, "
                f"expected once; {did_you_mean(name, named)}"
            )
        if not isinstance(new, list):
            raise TypeError(
                f"{where}: replace_rules.{name} must be a list of rules, such as [] to remove it, got {new!r}"
            )
    return [new for rule in rules for new in changes.get(str(rule["rule"]), [rule])]


def parse_corpus(tree: Mapping[str, Any], where: str) -> Corpus:
    """A corpus from what YAML gave, variants applied.

    where : what to call it in errors.

    Raises
    ------
    ValueError, TypeError
        On an unknown or missing key, a value that it cannot have, or two datasets of one name.
    """
    check_known(tree, _WHOLE, where)
    for key in ("name", "title", "datasets", "curation"):
        if key not in tree:
            raise ValueError(f"{where}: {key} is missing; a corpus has name, title, datasets and curation")
    listed = tree["datasets"]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{where}: datasets must be a list of at least one dataset")
    datasets = tuple(_dataset(entry, f"{where}: dataset {at}") for at, entry in enumerate(listed, start=1))
    _check_names(datasets, where)
    corpus = Corpus(
        name=text(tree, "name", where), title=text(tree, "title", where), description=text(tree, "description", where),
        citation=text(tree, "citation", where), datasets=datasets,
        curation=parse_recipe(tree["curation"], f"{where}: curation"), shard=mapping(tree, "shard", where),
        expected=from_tree(Expected, mapping(tree, "expected", where), f"{where}: expected"),
        epochs=whole_number(tree, "epochs", where), notes=texts(tree, "notes", where),
    )  # fmt: skip
    for rule in corpus.curation.rules:
        names = [dataset.name for dataset in datasets]
        strange = [name for name in rule.datasets or () if name not in names and not corpus.is_census]
        if strange:
            raise ValueError(
                f"{where}: rule {rule.name} names dataset {strange[0]!r}; {did_you_mean(strange[0], names)}"
            )
    return corpus


def _check_names(datasets: Sequence["CorpusDataset"], where: str) -> None:
    names = [dataset.name for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: two datasets are named {name!r}; give each a name of its own")
    if [dataset.kind for dataset in datasets].count(CENSUS) > 1:
        raise ValueError(
            f"{where}: two datasets are of kind {CENSUS}, whose datasets could not be told apart; keep one"
        )


def _dataset(tree: Any, where: str) -> CorpusDataset:
    if not isinstance(tree, Mapping):
        raise TypeError(f"{where}: expected a mapping with name, title and ingest, got {tree!r}")
    check_known(tree, (*_Plain.__dataclass_fields__, "ingest"), where)
    ingest = mapping(tree, "ingest", where)
    check_entry(ingest, where)
    try:
        plain = from_tree(_Plain, {key: value for key, value in tree.items() if key != "ingest"}, where)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
    values = {name: getattr(plain, name) for name in _Plain.__dataclass_fields__}
    dataset = CorpusDataset(ingest=ingest, **values)
    facts = {*dataset.facts(), *_FACTS}
    for name in [n for e in dataset.evidence for n in e.fields] + [e.field for e in dataset.unverified]:
        if name not in facts:
            raise ValueError(f"{where}: evidence or unverified names {name!r}; {did_you_mean(name, sorted(facts))}")
    return dataset


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """The fields of `CorpusDataset` that a typed tree can hold: all but the options of its ingest."""

    name: str
    title: str
    source: Source = field(default_factory=Source)
    gene_ids: GeneIds = "unknown"
    expected: Expected = field(default_factory=Expected)
    evidence: tuple[Evidence, ...] = ()
    unverified: tuple[Unverified, ...] = ()
    candidates: tuple[str, ...] = ()


_FACTS = (
    "source.accession", "source.files", "source.bytes", "gene_ids", "expected.samples", "expected.genes", "expected.source_samples",
    "expected.source_genes", "ingest.batch", "ingest.perturbation", "ingest.control", "ingest.cell_type", "ingest.version",
    "ingest.obs_filter",
)  # fmt: skip
"""Fields that may be spoken of even where they are empty."""
