"""The command line made from a dataclass: by jsonargparse and by argparse alone, and that both agree."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from tools.leaves import field_docs, options_leaves
from tools.options import Parsed, UsageError, parse_options
from tools.runner import to_jsonable


@dataclass(frozen=True, kw_only=True)
class Mask:
    """What the encoder is shown."""

    n_unmasked: int = 2048
    """Genes shown, at most 100 % of the panel."""
    temperature: float = 0.0
    is_fixed: bool = False

    def __post_init__(self) -> None:
        if self.n_unmasked < 1:
            raise ValueError(f"mask.n_unmasked must be at least 1 gene, got {self.n_unmasked}")


@dataclass(frozen=True, kw_only=True)
class Base:
    store: Path
    """Folder of the store."""


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    sources: tuple[Path, ...]
    """Files to read."""
    gene_ids: str | None = None
    """Column of var with Ensembl ids."""
    modality: Literal["sc", "bulk"] = "sc"
    raw: bool = False
    check: bool = True
    batches: tuple[str, ...] = ()
    """Names of batches,
    over two lines."""
    seeds: tuple[int, ...] | None = None
    fraction: float | None = None
    mask: Mask = field(default_factory=lambda: Mask(n_unmasked=16))


PARSERS = pytest.mark.parametrize("use_jsonargparse", [True, False], ids=["jsonargparse", "fallback"])


def parse(line: Sequence[str], *, use_jsonargparse: bool = True, cls: Any = Options) -> Parsed[Any]:
    return parse_options(
        cls,
        line,
        prog="txfm verb",
        positionals=("sources",) if cls is Options else (),
        description="Does it.",
        use_jsonargparse=use_jsonargparse,
    )


def printed(line: Sequence[str], *, use_jsonargparse: bool, cls: Any = Options) -> str:
    stdout = io.StringIO()
    with pytest.raises(SystemExit) as exit_, contextlib.redirect_stdout(stdout):
        parse(line, use_jsonargparse=use_jsonargparse, cls=cls)
    assert exit_.value.code in (0, None)
    return stdout.getvalue()


def refusal(line: Sequence[str], *, use_jsonargparse: bool) -> str:
    with pytest.raises(UsageError) as err:
        parse(line, use_jsonargparse=use_jsonargparse)
    return str(err.value)


@PARSERS
def test_flags_are_kebab_case_and_sections_dotted(use_jsonargparse: bool) -> None:
    line = [
        "a.h5ad",
        "b.h5ad",
        "--store",
        "s",
        "--gene-ids",
        "3",
        "--modality",
        "bulk",
        "--raw",
        "--no-check",
    ]
    line += ["--batches", "null", "7", "--seeds", "1", "2", "--fraction", "1e-3"]
    line += ["--mask.temperature", "2", "--mask.is_fixed", "true", "--json"]
    parsed = parse(line, use_jsonargparse=use_jsonargparse)
    assert parsed.as_json
    assert parsed.options == Options(
        store=Path("s"),
        sources=(Path("a.h5ad"), Path("b.h5ad")),
        gene_ids="3",
        modality="bulk",
        raw=True,
        check=False,
        batches=("null", "7"),
        seeds=(1, 2),
        fraction=0.001,
        mask=Mask(n_unmasked=16, temperature=2.0, is_fixed=True),
    )


@PARSERS
def test_defaults_come_from_the_dataclass(use_jsonargparse: bool) -> None:
    parsed = parse(["a", "--store", "s"], use_jsonargparse=use_jsonargparse)
    assert parsed == Parsed(options=Options(store=Path("s"), sources=(Path("a"),)), as_json=False)


@PARSERS
def test_words_after_two_dashes_are_positional(use_jsonargparse: bool) -> None:
    parsed = parse(["--store", "s", "--", "-a", "--json"], use_jsonargparse=use_jsonargparse)
    assert parsed.options.sources == (Path("-a"), Path("--json"))
    assert not parsed.as_json


@PARSERS
def test_the_command_line_overrides_files(tmp_path: Path, use_jsonargparse: bool) -> None:
    first = tmp_path / "first.yaml"
    first.write_text("sources: [x, y]\nstore: s\nraw: true\nfraction: 1e-4\nmask: {n_unmasked: 5}\n")
    second = tmp_path / "second.yaml"
    second.write_text("mask:\n  temperature: 3\nbatches: [p]\n")
    line = ["--gene-ids", "g", "--config", str(first), f"--config={second}", "--mask.n_unmasked", "7"]
    options = parse(line, use_jsonargparse=use_jsonargparse).options
    assert options.sources == (Path("x"), Path("y"))
    assert (options.store, options.raw, options.gene_ids) == (Path("s"), True, "g")
    assert (options.fraction, options.batches) == (1e-4, ("p",))
    assert options.mask == Mask(n_unmasked=7, temperature=3.0)
    assert parse(["z", *line], use_jsonargparse=use_jsonargparse).options.sources == (Path("z"),)
    earlier = parse(["--mask.n_unmasked", "7", "--config", str(first)], use_jsonargparse=use_jsonargparse)
    assert earlier.options.mask.n_unmasked == 7


@PARSERS
def test_print_config_is_a_file_that_gives_the_same_options(tmp_path: Path, use_jsonargparse: bool) -> None:
    line = ["a", "b", "--store", "s", "--seeds", "1", "--no-check", "--mask.n_unmasked", "9"]
    text = printed([*line, "--print_config"], use_jsonargparse=use_jsonargparse)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    for other in (True, False):
        assert parse(["--config", str(path)], use_jsonargparse=other) == parse(line, use_jsonargparse=other)


@PARSERS
def test_print_config_works_before_anything_is_given(tmp_path: Path, use_jsonargparse: bool) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(printed(["--print_config"], use_jsonargparse=use_jsonargparse))
    assert yaml.safe_load(path.read_text())["store"] is None
    line = ["--config", str(path), "a", "--store", "s"]
    assert parse(line, use_jsonargparse=use_jsonargparse) == parse(["a", "--store", "s"])


def test_help_is_the_text_under_each_field() -> None:
    assert field_docs(Options) == {
        "store": "Folder of the store.",
        "sources": "Files to read.",
        "gene_ids": "Column of var with Ensembl ids.",
        "batches": "Names of batches, over two lines.",
    }


@PARSERS
def test_help_lists_units_types_and_defaults(use_jsonargparse: bool) -> None:
    text = " ".join(printed(["--help"], use_jsonargparse=use_jsonargparse).split())
    assert text.startswith("usage: txfm verb SOURCES ... --store STORE [options] Does it.")
    for part in (
        "SOURCES Files to read. (Path ...; required)",
        "--store STORE Folder of the store. (Path; required)",
        "--gene-ids GENE_IDS Column of var with Ensembl ids. (str | None; default: null)",
        "--modality sc|bulk (sc|bulk; default: sc)",
        "--raw, --no-raw (bool; default: False)",
        "mask: What the encoder is shown.",
        "--mask.n_unmasked N_UNMASKED Genes shown, at most 100 % of the panel. (int; default: 16)",
        "--print_config",
        "`--json` prints one JSON object",
    ):
        assert part in text


GOOD = ["a", "--store", "s"]


@PARSERS
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], "missing: SOURCES, --store"),
        (["a"], "missing: --store"),
        ([*GOOD, "--gene_ids", "x"], "unknown option --gene_ids; did you mean --gene-ids?"),
        ([*GOOD, "--mask.n_unmaskd=3"], "unknown option --mask.n_unmaskd; did you mean --mask.n_unmasked?"),
        ([*GOOD, "--mask.n", "3"], "unknown option --mask.n"),
        ([*GOOD, "--mask.n_unmasked", "x"], "--mask.n_unmasked: expected int, got 'x'"),
        ([*GOOD, "--mask.n_unmasked", "1.5"], "--mask.n_unmasked: expected int, got"),
        ([*GOOD, "--mask.is_fixed", "maybe"], "--mask.is_fixed: expected bool, got 'maybe'"),
        ([*GOOD, "--fraction", "none"], "--fraction: expected float | None, got 'none'"),
        ([*GOOD, "--modality", "SC"], "--modality: expected sc|bulk, got 'SC'"),
        ([*GOOD, "--mask.n_unmasked", "0"], "mask.n_unmasked must be at least 1 gene, got 0"),
        (["a", "--store"], "argument --store: expected one argument"),
        (["--store", "s", "--raw", "--", "b", "-c"], None),
        ([*GOOD, "-q"], "unrecognized arguments: -q"),
        ([*GOOD, "--config"], "--config: expected one file"),
        ([*GOOD, "--config", "no.yaml"], "--config: no.yaml: No such file or directory"),
    ],
)
def test_what_does_not_fit_is_refused(line: list[str], expected: str | None, use_jsonargparse: bool) -> None:
    if expected is None:
        assert parse(line, use_jsonargparse=use_jsonargparse).options.raw
    else:
        assert expected in refusal(line, use_jsonargparse=use_jsonargparse)


@PARSERS
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gene_id: x\n", "unknown key gene_id; did you mean gene_ids?"),
        ("mask: {n_masked: 3}\n", "unknown key mask.n_masked; did you mean n_unmasked?"),
        ("mask: 3\n", "mask is a section, expected keys and values, got 3"),
        ("- a\n", "expected keys and values, got list"),
        ("a: [\n", "not YAML"),
        ("mask: {n_unmasked: '3x'}\n", "--mask.n_unmasked: expected int, got '3x'"),
        ("gene_ids: 3\n", "--gene-ids: expected str | None, got"),
        ("mask: {n_unmasked: 0}\n", "mask.n_unmasked must be at least 1 gene, got 0"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, text: str, expected: str, use_jsonargparse: bool) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert expected in refusal([*GOOD, "--config", str(path)], use_jsonargparse=use_jsonargparse)


@pytest.mark.parametrize(
    "line",
    [
        GOOD,
        ["a", "b", "--store", "s/t", "--no-raw", "--check"],
        [*GOOD, "--seeds", "3", "--batches", "b 1", "true", "1e5"],
        [*GOOD, "--gene-ids", "null", "--fraction", "null"],
        [*GOOD, "--gene-ids", "1e5", "--fraction", "5"],
        [*GOOD, "--gene-ids", "", "--fraction=-.5"],
        [*GOOD, "--mask.n_unmasked", "1_000", "--mask.temperature", "1E2", "--mask.is_fixed", "false"],
    ],
)
def test_both_parsers_give_the_same_options(line: list[str]) -> None:
    assert parse(line, use_jsonargparse=False) == parse(line, use_jsonargparse=True)
    ours = yaml.safe_load(printed([*line, "--print_config"], use_jsonargparse=False))
    theirs = yaml.safe_load(printed([*line, "--print_config"], use_jsonargparse=True))
    assert to_jsonable(ours) == to_jsonable(theirs)


def test_both_parsers_list_the_same_options() -> None:
    flags = [flag for leaf in options_leaves(Options) if leaf.key != "sources" for flag in leaf.flags]
    for use_jsonargparse in (True, False):
        text = printed(["--help"], use_jsonargparse=use_jsonargparse)
        assert [flag for flag in flags if flag not in text] == []


def test_the_training_tree_is_parsed_alike(tmp_path: Path) -> None:
    from txfm_model.config import TrainConfig

    path = tmp_path / "run.yaml"
    path.write_text("loop: {steps: 10}\noptim: {lr: 3e-4}\n")
    line = ["--config", str(path), "--shards", "c", "--out", "o", "--mask.n_unmasked", "64"]
    trees = [parse(line, use_jsonargparse=which, cls=TrainConfig).options for which in (True, False)]
    assert trees[0] == trees[1]
    assert trees[0].optim.lr == 3e-4
    assert trees[0].mask.n_unmasked == 64
