"""A corpus file: its datasets with their sources, what is known about each, the curation, and variants that change a part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from txfm_data.config_tree import did_you_mean, from_tree
from txfm_data.curate.recipe import Recipe, parse_recipe
from txfm_data.ingest.kinds import SOURCE_KINDS

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "corpora"
"""Where the corpora of this project lie."""
GeneIds = Literal["ensembl", "ensembl_version", "symbol", "unknown"]
CENSUS = "census"
KINDS = (*SOURCE_KINDS, CENSUS)
PATH_OPTIONS = ("path", "sample_table", "sample_sheet", "gene_map", "dataset_ids")
"""Options of an ingest that name a file or folder below that of the sources."""
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
        _check_relative(self.path, "path of a source file")


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
    """

    samples: int | None = None
    genes: int | None = None
    source_samples: int | None = None
    source_genes: int | None = None
    within: int = 0


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What shows that some fields of a dataset are right."""

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
        """Kind of the source: one of `KINDS`."""
        return str(self.ingest["kind"])

    @property
    def modality(self) -> str:
        """Single cells ("sc") or profiles ("bulk")."""
        return str(self.ingest.get("modality", "bulk" if self.kind in ("gct", "star", "table") else "sc"))

    def facts(self) -> dict[str, Any]:
        """The fields that somebody must know from the source, with their values; those not given are left out."""
        labels = {
            key: self.ingest.get(key) for key in ("kind", "values", "batch", "perturbation", "control", "cell_type")
        }
        sizes = {key: getattr(self.expected, key) for key in ("samples", "genes", "source_samples", "source_genes")}
        whole = {
            "identity": self.title, "source.accession": self.source.accession, "source.files": self.source.files or None,
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
        """The same corpus with some of its datasets, in its order, and the curation of those; of a part no size is expected."""
        for name in names:
            self.dataset(name)
        kept = tuple(dataset for dataset in self.datasets if dataset.name in names)
        expected = self.expected if kept == self.datasets else Expected()
        return replace(
            self, datasets=kept, curation=restricted(self.curation, [d.name for d in kept]), expected=expected
        )

    def with_curation(self, curation: Recipe) -> "Corpus":
        """The same corpus with other rules; ValueError if one names a dataset that the corpus has not got."""
        if not self.is_census:
            for name in [name for rule in curation.rules for name in rule.datasets or ()]:
                self.dataset(name)
        return replace(self, curation=curation)


def restricted(curation: Recipe, names: Sequence[str]) -> Recipe:
    """The rules that are left of a curation when only some datasets are there: a rule for none of them falls away."""
    rules = []
    for rule in curation.rules:
        if rule.datasets is None:
            rules.append(rule)
            continue
        left = tuple(name for name in rule.datasets if name in names)
        if left:
            rules.append(replace(rule, datasets=left))
    return replace(curation, rules=tuple(rules))


def corpus_names() -> list[str]:
    """Names of the corpora of this project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_corpus(name: str | Path) -> Corpus:
    """Read a corpus by its name, or from a YAML file.

    Raises
    ------
    FileNotFoundError
        If there is neither; the near names are given.
    ValueError, TypeError
        If it is no corpus: an unknown key, a missing one, or a value it cannot have.
    """
    return parse_corpus(_read_tree(_path_of(name)), str(name))


def _path_of(name: str | Path, beside: Path = FOLDER) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    for folder in (beside, FOLDER):
        if (found := folder / f"{name}.yaml").is_file():
            return found
    known = corpus_names()
    raise FileNotFoundError(f"{name}: no such corpus; {did_you_mean(str(name), known)} Or give the path of a YAML file")


def _read_tree(path: Path) -> dict[str, Any]:
    """A file as a tree; that of a variant with its base applied."""
    tree = _load(path)
    if "base" not in tree:
        return tree
    _known(tree, _VARIANT, str(path))
    base = _load(_path_of(str(tree["base"]), path.parent))
    if "base" in base:
        raise ValueError(
            f"{path}: its base {tree['base']!r} is a variant itself; name the corpus that it is a variant of"
        )
    return _varied(base, tree, str(path))


def _load(path: Path) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise TypeError(f"{path}: expected a corpus with keys such as name and datasets, got {type(tree).__name__}")
    return tree


def _varied(base: dict[str, Any], change: dict[str, Any], where: str) -> dict[str, Any]:
    """A base with the changes of a variant: fewer datasets, other rules, other expectations."""
    names = [dataset["name"] for dataset in base["datasets"]]
    kept, dropped = change.get("keep_datasets"), change.get("drop_datasets", [])
    for name in [*(kept or []), *dropped]:
        if name not in names:
            raise ValueError(f"{where}: its base has no dataset {name!r}; {did_you_mean(str(name), names)}")
    datasets = [d for d in base["datasets"] if (kept is None or d["name"] in kept) and d["name"] not in dropped]
    sizes = change.get("expected_datasets", {})
    for name in sizes:
        if name not in [d["name"] for d in datasets]:
            raise ValueError(f"{where}: expected_datasets names {name!r}; {did_you_mean(name, names)}")
    datasets = [
        d | {"expected": d.get("expected", {}) | sizes[d["name"]]} if d["name"] in sizes else d for d in datasets
    ]
    rules = _replaced(base["curation"]["rules"], change.get("replace_rules", {}), where)
    rules = _of_datasets(rules, [d["name"] for d in datasets])
    out = base | {key: change[key] for key in _WHOLE if key in change}
    out |= {
        "datasets": datasets,
        "curation": base["curation"] | {"rules": rules},
        "expected": change.get("expected", {}),
    }
    return out | {"shard": base.get("shard", {}) | change.get("shard", {})}


def _replaced(
    rules: list[dict[str, Any]], changes: Mapping[str, list[dict[str, Any]]], where: str
) -> list[dict[str, Any]]:
    """Rules with those of some names replaced by others, or by none; a name must stand for one rule."""
    named = [str(rule.get("rule")) for rule in rules]
    for name in changes:
        if named.count(name) != 1:
            raise ValueError(
                f"{where}: replace_rules names {name!r}, which occurs {named.count(name)} times among the rules of its base, "
                f"expected once; {did_you_mean(name, named)}"
            )
    return [new for rule in rules for new in changes.get(str(rule.get("rule")), [rule])]


def _of_datasets(rules: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rules as a file gives them, without what names other datasets; see `restricted`."""
    out = []
    for rule in rules:
        named = rule.get("datasets")
        left = None if named is None else [name for name in named if name in names]
        if left is None or left:
            out.append(rule if left is None else rule | {"datasets": left})
    return out


def parse_corpus(tree: Mapping[str, Any], where: str) -> Corpus:
    """A corpus from what YAML gave, variants applied.

    where : what to call it in errors.

    Raises
    ------
    ValueError, TypeError
        On an unknown or missing key, a value that it cannot have, or two datasets of one name.
    """
    _known(tree, _WHOLE, where)
    for key in ("name", "title", "datasets", "curation"):
        if key not in tree:
            raise ValueError(f"{where}: {key} is missing; a corpus has name, title, datasets and curation")
    listed = tree["datasets"]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{where}: datasets must be a list of at least one dataset")
    datasets = tuple(_dataset(entry, f"{where}: dataset {at}") for at, entry in enumerate(listed, start=1))
    names = [dataset.name for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: two datasets are named {name!r}; give each a name of its own")
    curation = parse_recipe(tree["curation"], f"{where}: curation")
    has_census = any(dataset.kind == CENSUS for dataset in datasets)
    for rule in curation.rules:
        strange = [name for name in rule.datasets or () if name not in names and not has_census]
        if strange:
            raise ValueError(
                f"{where}: rule {rule.name} names dataset {strange[0]!r}; {did_you_mean(strange[0], names)}"
            )
    rest = {key: tree[key] for key in ("name", "title", "epochs") if key in tree}
    return Corpus(
        **rest, description=_text(tree, "description", where), citation=_text(tree, "citation", where), datasets=datasets,
        curation=curation, shard=_mapping(tree, "shard", where),
        expected=from_tree(Expected, _mapping(tree, "expected", where), f"{where}: expected"),
        notes=tuple(str(note) for note in tree.get("notes", ())),
    )  # fmt: skip


def _dataset(tree: Any, where: str) -> CorpusDataset:
    if not isinstance(tree, Mapping):
        raise TypeError(f"{where}: expected a mapping with name, title and ingest, got {tree!r}")
    _known(tree, (*_Plain.__dataclass_fields__, "ingest"), where)
    ingest = _mapping(tree, "ingest", where)
    for key in ("kind", *(() if ingest.get("kind") == CENSUS else ("path", "values"))):
        if key not in ingest:
            raise ValueError(f"{where}: ingest has no {key}; it is an entry as txfm ingest list takes it")
    if ingest["kind"] not in KINDS:
        raise ValueError(f"{where}: there is no kind {ingest['kind']!r}; {did_you_mean(str(ingest['kind']), KINDS)}")
    for key, value in ingest.items():
        if not isinstance(value, str | int | float | bool | list | None):
            raise TypeError(f"{where}: ingest.{key} is the {type(value).__name__} {value}; put text in quotes")
    if "dataset" in ingest:
        raise ValueError(f"{where}: ingest names the dataset {ingest['dataset']!r}; leave it out, the name is above it")
    for key in PATH_OPTIONS:
        if ingest.get(key) is not None:
            _check_relative(ingest[key], f"{where}: ingest.{key}")
    plain = from_tree(_Plain, {key: value for key, value in tree.items() if key != "ingest"}, where)
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
    "source.accession", "source.files", "gene_ids", "expected.samples", "expected.genes", "expected.source_samples",
    "expected.source_genes", "ingest.batch", "ingest.perturbation", "ingest.control", "ingest.cell_type", "ingest.version",
    "ingest.obs_filter",
)  # fmt: skip
"""Fields that may be spoken of even where they are empty."""


def _mapping(tree: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    found = tree.get(key, {})
    if not isinstance(found, Mapping):
        raise TypeError(f"{where}: {key} must hold keys and values, got {found!r}")
    return dict(found)


def _text(tree: Mapping[str, Any], key: str, where: str) -> str:
    found = tree.get(key, "")
    if not isinstance(found, str):
        raise TypeError(f"{where}: {key} must be text, got {found!r}")
    return " ".join(found.split())


def _known(tree: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in tree:
        if key not in keys:
            raise ValueError(f"{where}: unknown key {key!r}; {did_you_mean(str(key), keys)}")


def _check_relative(path: Any, what: str) -> None:
    """Refuse a path that would leave the folder of sources: a corpus file may come from somebody else."""
    if not isinstance(path, str) or not path:
        raise ValueError(f"{what}: expected a path below the folder of sources, got {path!r}")
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{what}: {path!r} must lie below the folder of sources: neither absolute nor with ..")
