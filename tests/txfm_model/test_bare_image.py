"""Training from a checkout needs only torch, numpy, numba, pyarrow, webdataset, accelerate and what these bring."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = [
    "anndata", "cellxgene_census", "dask", "h5py", "jsonargparse", "matplotlib", "numcodecs", "pandas", "pytest",
    "scanpy", "scipy", "sklearn", "somacore", "statsmodels", "tensorboard", "tiledb", "tiledbsoma", "zarr",
]  # fmt: skip
PRELUDE = f"""
import sys
class Bare:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
"""


def run_bare(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PRELUDE + code], cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_train_from_a_checkout(tiny_shards, tmp_path):
    arguments = ["--config", "configs/txfm_tiny.yaml", "--shards", str(tiny_shards), "--out", str(tmp_path / "run")]
    arguments += ["--model.width", "16", "--loop.steps", "2", "--loop.global_batch", "8", "--json"]
    done = run_bare(
        f"sys.argv = ['tools/train.py', *{arguments!r}]\nimport runpy\nrunpy.run_path('tools/train.py', run_name='__main__')"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert (tmp_path / "run" / "checkpoint" / "config.json").exists()


def test_importing_the_package_is_light():
    """What takes long is imported where it is used."""
    heavy = {"accelerate", "numba", "scipy", "pandas", "tensorboard", "webdataset"}
    done = run_bare("import torch\nbefore = set(sys.modules)\nimport txfm_model\nprint(*(set(sys.modules) - before))")
    assert done.returncode == 0, done.stderr
    assert not heavy & set(done.stdout.split())
