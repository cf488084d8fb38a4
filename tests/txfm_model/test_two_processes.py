"""Two CPU processes really run, and give what one process gives on the same global batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--model.width=16", "--model.blocks=2", "--model.decoder_blocks=1", "--model.stochastic_depth=0.3",
    "--mask.n_unmasked=20", "--loop.steps=6", "--loop.global_batch=8", "--loop.log_every=1", "--loop.validate_every=3",
]  # fmt: skip
TWO_CPU_PROCESSES = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_train(launcher: list[str], shards: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, *launcher, str(ROOT / "tools" / "train.py"), f"--shards={shards}", f"--out={out}", *OPTIONS, *more,
        "--json",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "OMP_NUM_THREADS")}
    environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def read_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_give_what_one_gives(tiny_shards, tmp_path):
    """Masks and stochastic depth belong to samples, so one process in two parts and two processes do the same steps."""
    one = run_train([], tiny_shards, tmp_path / "one", "--loop.accumulation=2")
    two = run_train([*TWO_CPU_PROCESSES, "--main_process_port", free_port()], tiny_shards, tmp_path / "two")
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    alone, together = json.loads(one.stdout), json.loads(two.stdout)  # one JSON object: only the main process prints
    assert (alone["processes"], alone["accumulation"]) == (1, 2)
    assert together["processes"] == 2
    assert together["cpu_threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert (together["steps"], together["samples"]) == (6, 48)
    for name in ("train_loss", "train_excess", "val_loss", "val_excess", "panel_mean_val_loss"):
        assert together[name] == pytest.approx(alone[name], rel=1e-5), name
    lines = read_lines(tmp_path / "one"), read_lines(tmp_path / "two")
    assert len(lines[0]) == len(lines[1]) == 8
    for a, b in zip(*lines, strict=True):
        assert (a["split"], a["step"]) == (b["split"], b["step"])
        for name in {"loss", "excess", "grad_norm", "dead_gene_fraction"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-4), (name, a["step"])
    tensors = [load_file(tmp_path / run / "checkpoint" / "model.safetensors") for run in ("one", "two")]
    for name, tensor in tensors[0].items():
        np.testing.assert_allclose(tensors[1][name], tensor, rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_launch_line_that_starts_one_process_is_called_out(tiny_shards, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = run_train(launcher, tiny_shards, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 1
    assert "runs in 1 process(es), not in the at least 2 that were asked for" in done.stderr
