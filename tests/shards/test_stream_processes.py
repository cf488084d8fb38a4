"""Two real processes under `accelerate launch` share an epoch; one is killed, and a restart completes it exactly."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shards.manifest import Corpus
from shards.stream import MaskedStream
from tests.shards.corpus_maker import make_corpus
from tests.shards.two_processes import EPOCH, SETTINGS, saved_state, take_part

ROOT = Path(__file__).parents[2]
N_BATCHES = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("processes") / "corpus")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(folder: Path, run: Path, victim: int = -1, kill_at: int = -1) -> subprocess.CompletedProcess[str]:
    run.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port(),
        str(ROOT / "tests" / "shards" / "two_processes.py"), str(folder), str(run), "2", str(victim), str(kill_at),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


def journals(run: Path) -> dict[int, dict[int, dict]]:
    """By batch and rank, what was consumed last; a restart replaces what the ranks had not all done."""
    found: dict[int, dict[int, dict]] = {}
    for path in sorted(run.glob("journal-*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        for number, rank_entries in itertools.groupby(entries, key=lambda entry: entry["batch"]):
            for entry in rank_entries:
                found.setdefault(number, {})[entry["rank"]] = entry
    return found


def expected(folder: Path) -> list[tuple[list[int], list[list[int]]]]:
    """Ids and shown genes of every global batch of the epoch, from one process."""
    return [
        (batch.sample_id.tolist(), batch.gene_ids.tolist())
        for batch in MaskedStream(Corpus(folder), **SETTINGS).epoch(EPOCH)
    ]


def joined(ranks: dict[int, dict]) -> tuple[list[int], list[list[int]]]:
    parts = [ranks[rank] for rank in sorted(ranks)]
    return sum((part["ids"] for part in parts), []), sum((part["genes"] for part in parts), [])


def test_two_processes_see_every_sample_once(folder, tmp_path):
    run = tmp_path / "run"
    done = launch(folder, run)
    assert done.returncode == 0, done.stderr
    found = journals(run)
    assert [sorted(found[number]) for number in range(N_BATCHES)] == [[0, 1]] * N_BATCHES
    assert [joined(found[number]) for number in range(N_BATCHES)] == expected(folder)
    ids = [i for ranks in found.values() for entry in ranks.values() for i in entry["ids"]]
    assert len(ids) == len(set(ids)) == 80


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("kill_at", [0, int(np.random.default_rng(os.getpid()).integers(1, N_BATCHES))])
def test_a_process_killed_at_a_random_batch_and_a_restart_complete_the_epoch(folder, tmp_path, victim, kill_at):
    run = tmp_path / "run"
    killed = launch(folder, run, victim, kill_at)
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr
    before = journals(run)
    # The victim had not begun this batch; the other may have done it, and waits for the victim then.
    done = {path.name: json.loads(path.read_text())["batch"] for path in run.glob("state-*.json")}
    assert done[f"state-{victim}.json"] == kill_at
    assert done[f"state-{1 - victim}.json"] in (kill_at, kill_at + 1)
    alone = shutil.copytree(run, tmp_path / "alone")

    restarted = launch(folder, run)  # with two processes
    assert restarted.returncode == 0, restarted.stderr
    found = journals(run)
    assert [joined(found[number]) for number in range(N_BATCHES)] == expected(folder), (victim, kill_at)

    first = saved_state(alone)["batch"]  # and with one
    stream = MaskedStream(Corpus(folder), **SETTINGS)
    take_part(stream, alone, 0, 1, -1, lambda: None)
    rest = [json.loads(line) for line in (alone / "journal-1-0.jsonl").read_text().splitlines()]
    whole = [joined(before[number]) for number in range(first)] + [(entry["ids"], entry["genes"]) for entry in rest]
    assert whole == expected(folder), (victim, kill_at)
    ids = [i for part, _ in whole for i in part]
    assert len(ids) == len(set(ids)) == 80
