"""Dataclasses from nested dicts and back."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from txfm_data.config_tree import did_you_mean, from_tree, to_tree, type_name


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b", 3] = "a"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"inner.rate must be 0 or more, got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    n: int = 1
    on: bool = False
    path: Path | None = None
    sizes: tuple[int, ...] = ()
    box: tuple[float, str] = (1.0, "x")
    either: int | str = 0
    inner: Inner = field(default_factory=Inner)
    extra: Inner | None = None


def test_a_whole_tree() -> None:
    tree = {
        "name": "n",
        "n": 2,
        "on": True,
        "path": "a/b",
        "sizes": [1, 2],
        "box": [3, "y"],
        "either": "e",
        "inner": {"rate": 1, "kind": 3},
        "extra": {"kind": "b"},
    }
    config = from_tree(Outer, tree)
    assert config == Outer(
        name="n",
        n=2,
        on=True,
        path=Path("a/b"),
        sizes=(1, 2),
        box=(3.0, "y"),
        either="e",
        inner=Inner(rate=1.0, kind=3),
        extra=Inner(kind="b"),
    )
    assert isinstance(config.inner.rate, float)
    assert from_tree(Outer, json.loads(json.dumps(to_tree(config)))) == config


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({}, ValueError, "^name: required, but not given$"),
        ({"name": "n", "m": 1}, ValueError, "^m: unknown key; "),
        ({"name": "n", "inner": {"rat": 1}}, ValueError, "^inner.rat: unknown key; did you mean rate"),
        ({"name": 3}, TypeError, "^name: expected str, got 3$"),
        ({"name": "n", "n": 1.0}, TypeError, "^n: expected int, got 1.0$"),
        ({"name": "n", "n": True}, TypeError, "^n: expected int, got True$"),
        ({"name": "n", "on": 1}, TypeError, "^on: expected bool, got 1$"),
        ({"name": "n", "path": 3}, TypeError, "^path: expected Path . None, got 3$"),
        ({"name": "n", "sizes": "12"}, TypeError, "^sizes: expected a list of int ..., got '12'$"),
        ({"name": "n", "sizes": [1, "2"]}, TypeError, r"^sizes\[1\]: expected int, got '2'$"),
        ({"name": "n", "box": [1]}, TypeError, r"^box: expected 2 values \(float str\), got \[1\]$"),
        ({"name": "n", "either": 1.5}, TypeError, "^either: expected int . str, got 1.5$"),
        ({"name": "n", "inner": 3}, TypeError, "^inner: expected a mapping of fields, got 3$"),
        ({"name": "n", "extra": {"kind": "c"}}, TypeError, "^extra.kind: expected a.b.3, got 'c'$"),
        ({"name": "n", "inner": {"rate": False}}, TypeError, "^inner.rate: expected float, got False$"),
        ({"name": "n", "inner": {"rate": -1}}, ValueError, "^inner.rate must be 0 or more, got -1.0$"),
        ([], TypeError, "^Outer: expected a mapping of fields"),
    ],
)
def test_what_does_not_fit_is_refused(tree: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_tree(Outer, tree)


def test_a_type_that_yaml_cannot_hold_is_refused() -> None:
    @dataclass(frozen=True)
    class Bad:
        x: complex = 0j

    with pytest.raises(TypeError, match="x: a configuration cannot hold the type"):
        from_tree(Bad, {"x": 1})
    with pytest.raises(TypeError, match="takes a dataclass instance"):
        to_tree(Bad)


@given(
    name=st.text(max_size=5),
    n=st.integers(),
    sizes=st.lists(st.integers(), max_size=3),
    rate=st.floats(min_value=0, allow_nan=False, allow_infinity=False),
)
def test_to_tree_then_from_tree_is_the_identity(name: str, n: int, sizes: list[int], rate: float) -> None:
    config = Outer(name=name, n=n, sizes=tuple(sizes), inner=Inner(rate=rate))
    assert from_tree(Outer, json.loads(json.dumps(to_tree(config)))) == config


def test_near_names() -> None:
    assert did_you_mean("gene_id", ["gene-ids", "store"]) == "did you mean gene-ids?"
    assert did_you_mean("zzz", ["gene-ids", "store"]) == "known: gene-ids, store"
    assert did_you_mean("zzz", []) == "known: none"


def test_type_names() -> None:
    assert type_name(int | None) == "int | None"
    assert type_name(tuple[str, ...]) == "str ..."
    assert type_name(Literal["a", 1]) == "a|1"
