"""Imports go one way: txfm_data <- shards <- txfm_model, txfm_eval over txfm_data, tools over all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "txfm_data": set(),
    "shards": {"txfm_data"},
    "txfm_model": {"txfm_data", "shards"},
    "txfm_eval": {"txfm_data"},
}
OURS = ALLOWED.keys() | {"tools", "tests"}


def imported_top_levels(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it, by its text alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0] if node.level == 0 else path.parts[len(ROOT.parts)])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_dependency_direction(package: str) -> None:
    may = ALLOWED[package]
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    for path in paths:
        wrong = (imported_top_levels(path) & OURS) - may - {package}
        where = path.relative_to(ROOT)
        assert not wrong, f"{where} imports {sorted(wrong)}; {package} may import {sorted(may)}"


def test_nothing_imports_tools_or_tests() -> None:
    for path in sorted((ROOT / "tools").rglob("*.py")):
        assert "tests" not in imported_top_levels(path), path.relative_to(ROOT)


TORCH_FREE = {"torch", "accelerate"}
MODEL_FREE = {"tiledbsoma", "tiledb", "cellxgene_census", "zarr", "scanpy", "anndata"}


def test_the_store_side_needs_no_torch() -> None:
    for path in sorted((ROOT / "txfm_data").rglob("*.py")):
        wrong = imported_top_levels(path) & TORCH_FREE
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; txfm_data has no torch"


def test_torch_is_in_one_file_of_the_shards() -> None:
    users = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "shards").rglob("*.py"))
        if imported_top_levels(path) & TORCH_FREE
    ]
    assert users == ["shards/stream.py"]


@pytest.mark.parametrize("package", ["shards", "txfm_model", "txfm_eval"])
def test_the_training_side_needs_no_store(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        wrong = imported_top_levels(path) & MODEL_FREE
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; {package} runs without a store"
