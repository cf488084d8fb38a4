"""Real processes, really killed at any moment of an append: readers see the old store or the new one, nothing between.

Run as a program, this module imports what an ingest needs once and forks a child for each request it reads from stdin.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest

from tests.txfm_data.stores import adata_of, append, contents, write_datasets
from txfm_data import ingest
from txfm_data.ingest.options import IngestOptions
from txfm_data.parallel import Workers
from txfm_data.store import transaction
from txfm_data.store.opening import open_store
from txfm_data.store.verify import verify

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("soma", "zarr")
OPTIONS = {"batch": "batch", "symbols": "symbol", "modality": "bulk"}
OLD, NEW = (40, 30), (2_040, 140)
STOPPED = 9


def ingest_big(path: str, store: str) -> dict[str, Any]:
    """The command that is killed, and then run again."""
    return ingest.h5ad(path, store, "big", **OPTIONS)


# The program -----------------------------------------------------------------------------------------------------------


def stop_at(step: str) -> None:
    """Let this process end at a step of the exchange, as a crash would."""
    exchange, rename, rmtree = transaction._exchange, os.rename, shutil.rmtree

    def before(first: Path, second: Path) -> None:
        os._exit(STOPPED)

    def after(first: Path, second: Path) -> None:
        exchange(first, second)
        os._exit(STOPPED)

    def half_removed(path: Path, *args: Any, **kwargs: Any) -> None:
        if not Path(path).name.startswith(".store.new-"):
            rmtree(path, *args, **kwargs)
            return
        for file in sorted(p for p in Path(path).rglob("*") if p.is_file())[::2]:
            file.unlink()
        os._exit(STOPPED)

    def renamed(source: Any, target: Any) -> None:
        rename(source, target)
        names = Path(source).name.partition("-")[0], Path(target).name.partition("-")[0]
        if names == {
            "fallback: moved aside": ("store", ".store.old"), "fallback: in place": (".store.new", "store"),
        }[step]:  # fmt: skip
            os._exit(STOPPED)

    if step.startswith("fallback"):
        transaction.ctypes.CDLL = lambda *args, **kwargs: object()  # type: ignore[assignment,misc]
        os.rename = renamed
    elif step == "half removed":
        shutil.rmtree = half_removed  # type: ignore[assignment]
    elif step:
        transaction._exchange = {"before": before, "after": after}[step]


def child(request: dict[str, Any]) -> None:
    """One ingest in small blocks, so that it lasts."""
    os.setpgid(0, 0)
    print(f"started {os.getpid()}", flush=True)
    IngestOptions.block_bytes = lambda self: 100_000  # type: ignore[method-assign]
    stop_at(request["step"])
    if request["workers"]:
        OPTIONS["workers"] = Workers(n=request["workers"])  # type: ignore[assignment]
    ingest_big(request["path"], request["store"])


def serve() -> None:
    """Fork a child for each line of stdin and tell how it ended."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try:
                child(json.loads(line))
            except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on as the program
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        print(f"ended {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}", flush=True)


# The tests -------------------------------------------------------------------------------------------------------------


class Ingests:
    """Starts ingests, one at a time, in processes of their own."""

    def __init__(self, program: "subprocess.Popen[str]", path: Path) -> None:
        self._program, self.path = program, path

    def _read(self, word: str) -> int:
        found, _, number = self._program.stdout.readline().partition(" ")
        assert found == word
        return int(number)

    def run(
        self, store: Path, *, step: str = "", workers: int = 0, kill_after: float | None = None
    ) -> tuple[int, float]:
        """Run one; returns its exit code and the seconds it took. All its processes have ended."""
        request = {"path": str(self.path), "store": str(store), "step": step, "workers": workers}
        self._program.stdin.write(json.dumps(request) + "\n")
        self._program.stdin.flush()
        pid, begin = self._read("started"), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it had ended
        code, seconds = self._read("ended"), time.monotonic() - begin
        for _ in range(600):  # workers of a killed process end by themselves, in a moment
            try:
                os.killpg(pid, 0)
            except ProcessLookupError:
                return code, seconds
            time.sleep(0.05)
        raise AssertionError("workers outlived their killed process by half a minute")


@pytest.fixture(scope="module", autouse=True)
def without_fsync():
    """In this process; those that are killed wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Folder with a store of each backend and the file to append to them. Read it only."""
    folder = tmp_path_factory.mktemp("kill")
    files = write_datasets(folder)
    for backend in BACKENDS:
        append(files["first"], folder / backend, "first", backend=backend)
    counts = np.random.default_rng(7).poisson(0.8, (2_000, 120))
    counts[:, 0] += 1
    obs = pd.DataFrame({"batch": [f"b{i % 5}" for i in range(2_000)], "donor": [f"d{i % 9}" for i in range(2_000)]})
    adata_of(counts, list(range(20, 140)), obs.set_index(pd.Index([f"s{i}" for i in range(2_000)]))).write_h5ad(
        folder / "big.h5ad"
    )
    return folder


@pytest.fixture(scope="module")
def ingests(inputs) -> Iterator[Ingests]:
    command = [sys.executable, "-m", "tests.txfm_data.test_store_kill"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        yield Ingests(program, inputs / "big.h5ad")
        program.stdin.close()


@pytest.fixture(scope="module")
def unkilled(inputs, ingests, tmp_path_factory) -> dict[str, tuple[float, dict[str, Any]]]:
    """Per backend: seconds that the ingest takes if nobody kills it, and what the store says afterwards."""
    found = {}
    for backend in BACKENDS:
        store = shutil.copytree(inputs / backend, tmp_path_factory.mktemp(f"unkilled-{backend}") / "store")
        code, seconds = ingests.run(store)
        assert code == 0
        found[backend] = (seconds, contents(open_store(store)))
    return found


def beside(store: Path) -> list[str]:
    return sorted(p.name for p in store.parent.iterdir() if p != store)


def seen_by_others(store: Path, backend: str) -> tuple[tuple[int, int], float]:
    """Shape and sum of the counts as the Census package or AnnData reads them."""
    if backend == "zarr":
        adata = ad.read_zarr(store)
    else:
        with cellxgene_census.open_soma(uri=str(store)) as census:
            adata = cellxgene_census.get_anndata(census, "homo_sapiens")
    return adata.shape, float(adata.X.sum())


def check_after_kill(inputs: Path, store: Path, backend: str, wanted: dict[str, Any]) -> bool:
    """What holds after any kill; returns whether the append had been committed."""
    assert all(name == ".store.lock" or name.startswith(".store.new-") for name in beside(store)), beside(store)
    found = verify(store)
    shape = (found["n_obs"], found["n_vars"])
    assert shape in (OLD, NEW)
    if shape == OLD:
        assert seen_by_others(store, backend) == seen_by_others(inputs / backend, backend)
        assert contents(open_store(store)) == contents(open_store(inputs / backend))
    else:
        assert seen_by_others(store, backend) == (NEW, sum(record["total"] for record in wanted["datasets"]))
    run_again(inputs, store, wanted, is_there=shape == NEW)
    return shape == NEW


def run_again(inputs: Path, store: Path, wanted: dict[str, Any], *, is_there: bool) -> None:
    """The same command completes, or says that the dataset is there; afterwards nothing is doubled and nothing is left."""
    if is_there:
        with pytest.raises(ValueError, match=r"dataset 'big' is there already \(2000 samples from big\.h5ad\)"):
            ingest_big(str(inputs / "big.h5ad"), str(store))
    else:
        assert ingest_big(str(inputs / "big.h5ad"), str(store))["n_obs"] == 2_000
        assert beside(store) == []
    assert contents(open_store(store)) == wanted
    if is_there:  # what a kill after the commit left goes with the next append
        append(inputs / "third.h5ad", store, "third")
        assert beside(store) == [] and verify(store)["n_obs"] == 2_062


def kill_at_moments(
    inputs: Path, ingests: Ingests, folder: Path, backend: str, moments: int, unkilled: Any, workers: int = 0
) -> list[bool]:
    """Kill one ingest in each of so many equal parts of its duration; returns which had been committed."""
    seconds, wanted = unkilled[backend]
    if workers:
        store = shutil.copytree(inputs / backend, folder / "timed" / "store")
        code, seconds = ingests.run(store, workers=workers)
        assert code == 0 and contents(open_store(store)) == wanted
    rng = np.random.default_rng(20)
    committed = []
    for moment in range(moments):
        store = shutil.copytree(inputs / backend, folder / str(moment) / "store")
        code, _ = ingests.run(store, workers=workers, kill_after=seconds * (moment + rng.uniform()) / moments)
        assert code in (0, -signal.SIGKILL)
        committed.append(check_after_kill(inputs, store, backend, wanted))
        shutil.rmtree(folder / str(moment))
    return committed


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_append_killed_at_any_moment_is_there_whole_or_not_at_all(inputs, ingests, tmp_path, backend, unkilled):
    committed = kill_at_moments(inputs, ingests, tmp_path, backend, 4, unkilled)
    assert not committed[0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_thirty_kills(inputs, ingests, tmp_path, backend, workers, unkilled):
    committed = kill_at_moments(inputs, ingests, tmp_path, backend, 30, unkilled, workers)
    assert not committed[0] and sum(committed) < 15


@pytest.mark.parametrize(
    ("backend", "step", "is_there"),
    [
        ("soma", "before", False), ("soma", "half removed", True),
        ("zarr", "before", False), ("zarr", "after", True), ("zarr", "half removed", True),
    ],
)  # fmt: skip
def test_an_end_at_each_step_of_the_exchange(inputs, ingests, tmp_path, backend, unkilled, step, is_there):
    store = shutil.copytree(inputs / backend, tmp_path / "in" / "store")
    assert ingests.run(store, step=step)[0] == STOPPED
    assert verify(store)["unfinished"]
    assert check_after_kill(inputs, store, backend, unkilled[backend][1]) == is_there
    assert not verify(store)["unfinished"]


@pytest.mark.parametrize(
    ("backend", "step", "left", "is_there"),
    [
        ("soma", "fallback: moved aside", [".store.lock", ".store.new", ".store.old"], False),
        ("zarr", "fallback: moved aside", [".store.lock", ".store.new", ".store.old"], False),
        ("zarr", "fallback: in place", [".store.lock", ".store.old"], True),
    ],
)
def test_an_end_within_the_exchange_in_two_steps(inputs, ingests, tmp_path, backend, unkilled, step, left, is_there):
    """Where folders cannot change places at once, the old one stands aside for a moment: an append or a verify puts it back."""
    store = shutil.copytree(inputs / backend, tmp_path / "in" / "store")
    assert ingests.run(store, step=step)[0] == STOPPED
    assert [name.partition("-")[0] for name in beside(store) if name != "store"] == left
    assert store.exists() == (step != "fallback: moved aside")
    if not store.exists() and backend == "zarr":
        assert verify(store)["n_obs"] == 40 and store.exists()
        assert [name.partition("-")[0] for name in beside(store)] == [".store.new"]
    run_again(inputs, store, unkilled[backend][1], is_there=is_there)


if __name__ == "__main__":
    serve()
