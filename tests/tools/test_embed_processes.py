"""Two processes of a real launcher embed and impute bit by bit what one does; one that dies leaves nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from txfm_model.config import ModelConfig
from txfm_model.model import TxFM

ROOT = Path(__file__).parents[2]
LAUNCH = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment() -> dict[str, str]:
    left = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return left | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # as many threads a process, or sums differ


def command(launcher: list[str], verb: str, *words: object) -> list[str]:
    return [sys.executable, *launcher, str(ROOT / "tools" / f"{verb}.py"), *map(str, words), "--json"]


def two() -> list[str]:
    return [*LAUNCH, "--main_process_port", free_port()]


def run(launcher: list[str], verb: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(launcher, verb, *words), env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_shards) -> Path:
    from shards.manifest import Corpus

    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    config = ModelConfig(width=16, blocks=1, heads=2, decoder_blocks=1)
    TxFM(config, Corpus(tiny_shards).vocabulary).save_pretrained(folder)
    return folder


def test_two_processes_write_what_one_writes(checkpoint, tiny_shards, tmp_path):
    common = (tiny_shards, "--model", checkpoint, "--n-unmasked", 20, "--views", 2)
    done = [
        run(launcher, "embed", *common, "--out", tmp_path / f"{name}.h5ad")
        for name, launcher in (("one", []), ("two", two()))
    ]
    for process in done:
        assert process.returncode == 0, process.stderr
    results = [json.loads(process.stdout) for process in done]  # one JSON object: only the first process prints
    assert [result.pop("processes") for result in results] == [1, 2]
    assert [result.pop("out") for result in results] == [str(tmp_path / f"{name}.h5ad") for name in ("one", "two")]
    assert results[0] == results[1]
    one, together = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("one", "two"))
    np.testing.assert_array_equal(together.obsm["X_txfm"], one.obsm["X_txfm"])
    assert together.obs.equals(one.obs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5ad", "two.h5ad"]


@pytest.mark.slow
def test_damage_in_the_part_of_one_process_stops_both(checkpoint, tiny_shards, tmp_path):
    """The second block, which is the second process' first part."""
    from shards.manifest import Corpus

    copy = shutil.copytree(tiny_shards, tmp_path / "copy.shards")
    (_, _), (name, block) = Corpus(copy).blocks("train")[:2]
    data = bytearray((copy / name).read_bytes())
    data[block.offset + 600] ^= 4
    (copy / name).write_bytes(bytes(data))
    done = run(two(), "embed", copy, "--model", checkpoint, "--out", tmp_path / "x" / "out.h5ad")
    assert done.returncode != 0
    assert f"txfm embed: error: {copy / name}: block at byte {block.offset}" in done.stderr
    assert list((tmp_path / "x").iterdir()) == []


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the processes of a launcher in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_leaves_no_output(checkpoint, tiny_files, tmp_path, rank):
    """Enough views to take minutes; a process is killed once both are at work, and the other one cleans up."""
    arguments = (tiny_files[0], "--model", checkpoint, "--n-unmasked", 20, "--views", 200_000)
    words = command(two(), "embed", *arguments, "--out", tmp_path / "out" / "x.h5ad")
    launcher = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("out/.x.h5ad.*/process-*.raw"))) < 2:
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.1)
        ranks = {}
        for child in children(launcher.pid):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found = [v for v in variables if v.startswith(b"RANK=")]
            if found:
                ranks[int(found[0][5:])] = child
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[rank], signal.SIGKILL)
        assert launcher.wait(timeout=60) != 0
    finally:
        launcher.kill()
        launcher.wait()
    assert list((tmp_path / "out").iterdir()) == []
