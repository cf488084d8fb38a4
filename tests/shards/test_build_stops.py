"""Builds that are stopped, refused or run twice: the same command ends with the same bytes, or leaves nothing."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards import needs, order, shuffle, spill, writer
from shards.manifest import Corpus
from shards.select import ShardConfig
from shards.staging import stage_folder, staging
from shards.writer import build_shards, plan_shards
from tests.shards.builds import files_of, small_pieces
from txfm_data import parallel
from txfm_data.parallel import Workers
from txfm_data.store.opening import open_store

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ShardConfig(block_rows=8, lanes=2, seed=3, shard_bytes=2**20, weights={"first": 0.5})
MIB = 1024**2


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    small_pieces(monkeypatch)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, known_zarr):
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch)
        out = tmp_path_factory.mktemp("expected") / "c"
        build_shards(open_store(known_zarr), out, CONFIG)
    return files_of(out)


def stop_between_passes(done: int, total: int) -> None:
    """A progress callback that ends the build when pass 1 is over."""
    if done == total // 2:
        raise KeyboardInterrupt


def stop_in_pass_2(done: int, total: int) -> None:
    """A progress callback that ends the build when several shards are finished, and others are not."""
    if done >= 0.8 * total:
        raise KeyboardInterrupt


def stop_after(n: int):
    """A progress callback that ends the build at its n-th call as Ctrl-C would."""
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == n:
            raise KeyboardInterrupt

    return progress


def test_a_build_stopped_after_any_piece_goes_on(tmp_path, known_zarr, expected):
    store, out = open_store(known_zarr), tmp_path / "c"
    calls = []
    build_shards(store, tmp_path / "all", CONFIG, progress=lambda *step: calls.append(step))
    assert len(calls) > 12
    n_read = [done for done, _ in calls].index(calls[-1][1] // 2) + 1
    for n in (1, n_read, n_read + 1, len(calls)):
        seen = []
        with pytest.raises(KeyboardInterrupt):
            build_shards(store, out, CONFIG, progress=stop_after(n))
        assert not out.exists() and stage_folder(out).is_dir()
        result = build_shards(store, out, CONFIG, progress=lambda *step, seen=seen: seen.append(step))
        assert result["resumed"] and files_of(out) == expected
        assert len(seen) <= len(calls) - n + 2  # what was done is not done again, and told at once
        shutil.rmtree(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all"]


def test_a_build_stopped_again_and_again_ends(tmp_path, known_zarr, expected):
    store, out = open_store(known_zarr), tmp_path / "c"
    for _ in range(100):
        try:
            build_shards(store, out, CONFIG, progress=stop_after(3), workers=Workers(memory=900 * MIB))
        except KeyboardInterrupt:
            continue
        break
    assert files_of(out) == expected


@pytest.mark.parametrize("change", ["weights", "obs"])
def test_another_build_does_not_take_over_the_pieces(tmp_path, known_zarr, expected, change):
    store, out = open_store(known_zarr), tmp_path / "c"
    other = {
        "weights": ShardConfig(block_rows=8, lanes=2, seed=3, shard_bytes=2**20, weights={"first": 0.25}),
        "obs": ShardConfig(
            block_rows=8, lanes=2, seed=3, shard_bytes=2**20, weights={"first": 0.5}, obs_columns=("age",)
        ),
    }[change]
    with pytest.raises(KeyboardInterrupt):
        build_shards(store, out, other, progress=stop_in_pass_2)
    assert not build_shards(store, out, CONFIG)["resumed"]
    assert files_of(out) == expected and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_pieces_that_the_disk_lost_are_made_again(tmp_path, known_zarr, expected):
    store, out = open_store(known_zarr), tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        build_shards(store, out, CONFIG, progress=stop_in_pass_2)
    stage = stage_folder(out)
    spills, tars = sorted(stage.glob("spills-*/*.spill")), sorted(stage.glob("shards-*/*.tar"))
    assert len(spills) > 8 and len(tars) > 1
    spills[0].write_bytes(spills[0].read_bytes()[:-1])
    spills[1].unlink()
    spills[2].with_suffix(".json").write_text("{")
    spills[3].with_suffix(".json").write_text('{"n_bytes": 3}')
    data = bytearray(tars[0].read_bytes())
    data[600] ^= 1
    tars[0].write_bytes(data)
    (stage / next(iter(stage.glob("shards-*"))).name / "train-000009.tar.12345678.part").write_bytes(b"left")
    build_shards(store, out, CONFIG)
    assert files_of(out) == expected


@pytest.mark.parametrize("part", ["values", "record", "sums"])
def test_a_spill_that_changed_does_not_get_into_a_shard(tmp_path, known_zarr, part):
    store, out = open_store(known_zarr), tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        build_shards(store, out, CONFIG, progress=stop_between_passes)
    path = sorted(stage_folder(out).glob("spills-*/*.spill"))[3]
    found = json.loads(path.with_suffix(".json").read_text())
    at = {"values": 3, "record": found["n_words"] * 8 + 20, "sums": found["n_bytes"] - 5}[part]
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path.name}: is not what pass 1 wrote"):
        build_shards(store, out, CONFIG)
    assert not list(tmp_path.iterdir())
    assert not build_shards(store, out, CONFIG)["resumed"]


def test_two_builds_of_one_corpus_are_refused(tmp_path, known_zarr, expected):
    store, out = open_store(known_zarr), tmp_path / "c"
    with staging(stage_folder(out), "0" * 64, str(out)):
        with pytest.raises(ValueError, match=r"another process is building it in .*\.c\.building; wait"):
            build_shards(store, out, CONFIG)
        assert stage_folder(out).is_dir()
    build_shards(store, out, CONFIG)
    assert files_of(out) == expected


def test_a_scheduler_that_does_not_answer_leaves_the_pieces(tmp_path, known_zarr, expected, monkeypatch):
    store, out = open_store(known_zarr), tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        build_shards(store, out, CONFIG, progress=stop_between_passes)
    monkeypatch.setattr(parallel, "_ANSWER_S", 0.2)
    with pytest.raises(ValueError, match="no Dask scheduler answers"):
        build_shards(store, out, CONFIG, workers=Workers(scheduler="tcp://127.0.0.1:9"))
    assert build_shards(store, out, CONFIG)["resumed"] and files_of(out) == expected


def test_what_is_there_already_is_left_alone(tmp_path, known_zarr):
    store = open_store(known_zarr)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("c", "file"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            build_shards(store, tmp_path / name, CONFIG)
        with pytest.raises(FileExistsError, match="not an empty folder"):
            plan_shards(store, tmp_path / name, CONFIG)
    with pytest.raises(NotADirectoryError):
        build_shards(store, tmp_path / "file" / "c", CONFIG)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c", "file", "mine"]
    (tmp_path / "empty").mkdir()
    build_shards(store, tmp_path / "empty", CONFIG)
    assert Corpus(tmp_path / "empty").n_samples("train") > 0


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path, known_zarr):
    out = tmp_path / "c"

    def appear(done: int, total: int) -> None:
        if done == total:
            out.mkdir(exist_ok=True)
            (out / "mine").write_text("x")

    with pytest.raises(FileExistsError, match="not an empty folder"):
        build_shards(open_store(known_zarr), out, CONFIG, progress=appear)
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_scratch_holds_what_is_unfinished(tmp_path, known_zarr, expected):
    store, out, scratch = open_store(known_zarr), tmp_path / "deep" / "c", tmp_path / "scratch"
    with pytest.raises(KeyboardInterrupt):
        build_shards(store, out, CONFIG, scratch=scratch, progress=stop_after(9))
    assert not out.parent.exists() and len(list(scratch.iterdir())) == 1
    assert build_shards(store, out, CONFIG, scratch=scratch)["resumed"]
    assert files_of(out) == expected and not list(scratch.iterdir())


def test_a_budget_that_is_too_small_is_refused_before_counts_are_read(tmp_path, known_zarr, monkeypatch):
    store, out = open_store(known_zarr), tmp_path / "c"
    monkeypatch.setattr(type(store), "scan", None)
    with pytest.raises(ValueError, match=r"listing 93 samples takes about .* MiB, the memory budget is 500 MiB"):
        build_shards(store, out, CONFIG, workers=Workers(memory=500 * MIB))
    with pytest.raises(
        ValueError, match=r"93 samples in 1 process\(es\) takes at least (\d+) MiB.* budget is 600 MiB"
    ) as error:
        build_shards(store, out, CONFIG, workers=Workers(memory=600 * MIB))
    least = int(str(error.value).split("at least ")[1].split(" ")[0])
    with pytest.raises(ValueError, match="in 4 process"):
        build_shards(store, out, CONFIG, workers=Workers(memory=900 * MIB, n=4))
    assert plan_shards(store, out, CONFIG, workers=Workers(memory=least * MIB))["memory_bytes"] <= least * MIB
    monkeypatch.setattr(shuffle.codec, "MAX_DECODED_BYTES", 1_000)
    with pytest.raises(ValueError, match="a block of .* samples would take .*lower --block"):
        build_shards(store, out, CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused(tmp_path, known_zarr, monkeypatch):
    usage = type("usage", (), {"free": 1_000})
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: usage)
    for call in (build_shards, plan_shards):
        with pytest.raises(OSError, match=r"MiB are needed there .*spills.*1 MiB are free"):
            call(open_store(known_zarr), tmp_path / "c", CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_what_a_second_run_goes_on_from(tmp_path, known_zarr, expected, monkeypatch):
    store, out, calls = open_store(known_zarr), tmp_path / "c", []
    fsync = os.fsync

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 11:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(spill.os, "fsync", full)
    with pytest.raises(OSError, match=r"disk of .*\.c\.building is full; free some space and run the command again"):
        build_shards(store, out, CONFIG)
    assert build_shards(store, out, CONFIG)["resumed"] and files_of(out) == expected


def test_every_wrong_setting_is_refused_and_leaves_nothing(tmp_path, known_zarr):
    store = open_store(known_zarr)
    for config, message in (
        ({"datasets": ("fourth",)}, "no dataset 'fourth'"), ({"datasets": ("first", "first")}, "named twice"),
        ({"min_cells": 1_000}, "lower --min-cells"), ({"weights": {"fourth": 0.5}}, "names dataset 'fourth'"),
        ({"weights": {"third": 0.5}, "datasets": ("first",)}, "not taken"), ({"obs_columns": ("nothing",)}, "no such column"),
        ({"obs_columns": ("batch",)}, "have batch anyway"), ({"obs_columns": ("soma_joinid",)}, "have sample_id anyway"),
        ({"obs_columns": ("counts",)}, "anyway"), ({"selection": str(tmp_path / "no")}, "no selection.json there"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build_shards(store, tmp_path / "c", ShardConfig(**config))
    with pytest.raises(ValueError, match="two ways"):
        Workers(n=1, scheduler="tcp://x:1")
    assert not list(tmp_path.iterdir())


def test_a_worker_that_sees_another_store_is_told(tmp_path, known_zarr, tiny_store, monkeypatch):
    from shards import scatter

    plain = scatter.Scatter.lend
    monkeypatch.setattr(scatter.Scatter, "lend", lambda work, store: staging_nothing())
    monkeypatch.setattr(writer, "Scatter", lambda key, path, *rest: scatter.Scatter(key, str(tiny_store), *rest))
    with pytest.raises(ValueError, match="other datasets on a worker than where the build began"):
        build_shards(open_store(known_zarr), tmp_path / "c", CONFIG)
    assert plain is not scatter.Scatter.lend and not list(tmp_path.iterdir())


def staging_nothing():
    from contextlib import nullcontext

    return nullcontext()


# Real processes, really killed -----------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys
from pathlib import Path
import pytest
from shards.writer import build_shards
from tests.shards.builds import small_pieces
from tests.shards.test_build_stops import CONFIG
from txfm_data import parallel
from txfm_data.parallel import Workers
from txfm_data.store.opening import open_store

def main():
    small_pieces(pytest.MonkeyPatch())
    store, out, workers, percent = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

    def progress(done, total):
        if 100 * done >= percent * total:
            os.kill(os.getpid(), signal.SIGKILL)

    build_shards(open_store(store), Path(out), CONFIG, workers=Workers(n=workers), progress=progress)

if __name__ == "__main__":
    main()
"""


def killed(folder: Path, store: Path, out: Path, workers: int, percent: int) -> int:
    """Build in a process that kills itself when so much is done; the group of it and of its workers."""
    script = folder / "program.py"
    script.write_text(PROGRAM)
    words = [sys.executable, str(script), str(store), str(out), str(workers), str(percent)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, start_new_session=True) as process:
        assert process.wait() == -signal.SIGKILL
    return process.pid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "percent"), [(0, 1), (0, 30), (0, 50), (0, 60), (0, 90), (0, 100), (2, 20), (2, 70)]
)
def test_a_killed_build_goes_on(tmp_path, known_zarr, expected, workers, percent):
    out = tmp_path / "out" / "c"
    group = killed(tmp_path, known_zarr, out, workers, percent)
    assert not out.exists()
    try:  # workers outlive it for a moment, and may write while the next build does
        result = build_shards(open_store(known_zarr), out, CONFIG)
        assert files_of(out) == expected and result["resumed"]
        assert [p.name for p in out.parent.iterdir()] == ["c"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


@pytest.mark.slow
def test_a_scheduler_of_its_own_gives_the_same_bytes(tmp_path, known_zarr, expected):
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address="127.0.0.1:0") as cluster:
        workers = Workers(scheduler=cluster.scheduler_address)
        build_shards(open_store(known_zarr), tmp_path / "c", CONFIG, workers=workers)
    assert files_of(tmp_path / "c") == expected


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path, known_zarr, expected):
    out = tmp_path / "out" / "c"
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    words = [sys.executable, str(script), str(known_zarr), str(out), "0", "101"]
    draws = order.sort_keys(0, 8, seed=5, item=1)
    for draw in draws.tolist():
        with subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
            deadline_s = time.monotonic() + 60
            while not stage_folder(out).exists() and process.poll() is None and time.monotonic() < deadline_s:
                time.sleep(0.002)
            time.sleep(0.4 * draw / 2**64)
            process.kill()
        if out.exists():
            assert files_of(out) == expected
            shutil.rmtree(out)
    build_shards(open_store(known_zarr), out, CONFIG)
    assert files_of(out) == expected and [p.name for p in out.parent.iterdir()] == ["c"]
