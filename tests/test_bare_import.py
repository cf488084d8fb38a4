"""A bare GPU image (torch, numpy, numba, pyarrow, webdataset, accelerate) imports and trains."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("tiledbsoma", "tiledb", "cellxgene_census", "zarr", "scanpy", "anndata", "jsonargparse", "pandas")
ABSENT += ("h5py", "sklearn")

BLOCKER = """
import importlib, importlib.abc, importlib.util, sys, time

ABSENT = set({absent!r})

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)

sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ABSENT else find_spec(name, package)
"""


def run_blocked(script: str, absent: tuple[str, ...] = ABSENT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", BLOCKER.format(absent=absent) + script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def modules_of(package: str) -> list[str]:
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("package", ["txfm_model", "shards"])
def test_every_module_imports_without_the_store(package: str) -> None:
    script = f"for name in {modules_of(package)!r}:\n    importlib.import_module(name)\nprint('all')"
    done = run_blocked(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all"


def test_the_blocker_blocks() -> None:
    done = run_blocked("import anndata")
    assert done.returncode == 1
    assert "blocked by the test" in done.stderr


def test_train_reads_its_options_without_jsonargparse() -> None:
    script = "from tools.train import main\nprint(main(['--help']))"
    done = run_blocked(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0"
    assert "--mask.n_unmasked" in done.stdout


def test_import_of_the_model_costs_no_second_more_than_torch() -> None:
    script = """
import torch
start = time.perf_counter()
import txfm_model
print(time.perf_counter() - start)
"""

    def seconds() -> float:
        done = run_blocked(script)
        assert done.returncode == 0, done.stderr
        return float(done.stdout.splitlines()[-1])

    # Other work on the machine can slow one import; it takes a real change to slow three.
    assert any(seconds() <= 1.0 for _ in range(3))
