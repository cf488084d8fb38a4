"""Runs that are told to stop, killed, or cannot write or go on: what is left, what is said, and that it goes on from there."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from txfm_model.checkpoint import verify_checkpoint

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--model.width=16", "--model.blocks=2", "--model.heads=2", "--model.decoder_blocks=1", "--model.stochastic_depth=0.2",
    "--mask.n_unmasked=20", "--loop.global_batch=8", "--loop.log_every=1", "--loop.validate_every=1000",
    "--loop.precision=no", "--loop.cpu_threads=1",
]  # fmt: skip
TWO = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
PREEMPTED = 75


def command(shards: Path, out: Path, *more: str, launcher: tuple[str, ...] = ()) -> list[str]:
    script = str(ROOT / "tools" / "train.py")
    return [sys.executable, *launcher, script, f"--shards={shards}", f"--out={out}", *OPTIONS, *more, "--json"]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "OMP_NUM_THREADS")}
    return kept | {"ACCELERATE_USE_CPU": "true"}


def two_processes() -> tuple[str, ...]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return (*TWO, "--main_process_port", str(probe.getsockname()[1]))


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=240)


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_step(out: Path, process: "subprocess.Popen[str]", step: int) -> None:
    """Until the metrics of a step are there."""
    path = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and len(path.read_text().splitlines()) >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


def kill_group(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def weights(out: Path) -> dict:
    return load_file(out / "checkpoint" / "model.safetensors")


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.rglob(".*") if path.name != ".lock"]


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tobytes() == tensor.tobytes(), name


def uninterrupted_run(tiny_shards: Path, out: Path, steps: int) -> Path:
    done = run(command(tiny_shards, out, f"--loop.steps={steps}", "--loop.checkpoint_every=null"))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def uninterrupted(tiny_shards, tmp_path_factory) -> Path:
    return uninterrupted_run(tiny_shards, tmp_path_factory.mktemp("uninterrupted") / "run", 400)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_told_to_stop_it_saves_and_goes_on_later(uninterrupted, tiny_shards, tmp_path, number):
    out = tmp_path / "run"
    arguments = command(tiny_shards, out, "--loop.steps=400", "--loop.checkpoint_every=null", "--resume=auto")
    process = start(arguments)
    wait_for_step(out, process, 3)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, stderr
    assert stdout == ""
    (saved,) = checkpoints(out)
    assert str(saved) in stderr
    assert "--resume auto" in stderr
    again = run(arguments)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["resumed_from_step"] == int(saved.name.removeprefix("step-"))
    assert_same(weights(out), weights(uninterrupted))
    assert not leftovers(out)


@pytest.mark.slow
def test_two_processes_told_to_stop_save_once_and_one_goes_on(uninterrupted, tiny_shards, tmp_path):
    out = tmp_path / "run"
    more = ("--loop.steps=400", "--loop.checkpoint_every=null", "--resume=auto")
    process = start(command(tiny_shards, out, *more, launcher=two_processes()))
    wait_for_step(out, process, 3)
    process.terminate()  # the launcher, which hands it on
    stderr = process.communicate(timeout=90)[1]
    assert process.returncode != 0
    (saved,) = checkpoints(out)
    assert stderr.count(str(saved)) == 2  # each process names it
    alone = run(command(tiny_shards, out, *more))
    assert alone.returncode == 0, alone.stderr
    expected = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for here, there in zip(found[:50], expected[:50], strict=True):  # rounding grows with the number of steps
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-3), here["step"]


def survive_kills(tiny_shards: Path, out: Path, kills: int, seed: int, steps: int) -> int:
    """Start a run again and again and kill it at random moments; returns how often it was killed."""
    rng = random.Random(seed)
    often = ("--loop.checkpoint_every=1", "--loop.keep_checkpoints=2", "--resume=auto")
    arguments = command(tiny_shards, out, f"--loop.steps={steps}", *often)
    for killed in range(kills):
        before = checkpoints(out)[-1].name if out.exists() and checkpoints(out) else "step-00000000"
        process = start(arguments)
        deadline = time.monotonic() + 120
        while not (out / "checkpoints").is_dir() or checkpoints(out)[-1:] <= [out / "checkpoints" / before]:
            if process.poll() is not None:  # finished before it could be killed
                assert process.returncode == 0, process.communicate()[1]
                return killed
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))  # a save takes most of a step here, so most kills fall into one
        kill_group(process)
        assert checkpoints(out), "no checkpoint is left"
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    return kills


def test_killed_at_random_moments_it_ends_where_it_would_have(tiny_shards, tmp_path):
    expected = uninterrupted_run(tiny_shards, tmp_path / "uninterrupted", 40)
    assert survive_kills(tiny_shards, tmp_path / "run", kills=1, seed=1, steps=40) == 1
    assert_same(weights(tmp_path / "run"), weights(expected))
    assert not leftovers(tmp_path / "run")


@pytest.mark.slow
def test_killed_at_twenty_random_moments(uninterrupted, tiny_shards, tmp_path):
    assert survive_kills(tiny_shards, tmp_path / "run", kills=20, seed=2, steps=400) == 20
    assert_same(weights(tmp_path / "run"), weights(uninterrupted))
    assert not leftovers(tmp_path / "run")


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_nothing_is_lost(tiny_shards, tmp_path):
    out = tmp_path / "run"
    more = ("--loop.steps=4000", "--loop.checkpoint_every=5", "--resume=auto")
    process = start(command(tiny_shards, out, *more, launcher=two_processes()))
    wait_for_step(out, process, 12)
    children = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()]
    os.kill(children[-1], signal.SIGKILL)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode != 0, stderr
    assert checkpoints(out)
    last = checkpoints(out)[-1]
    verify_checkpoint(last)
    state = json.loads((last / "resume.json").read_text())
    assert state["step"] == int(last.name.removeprefix("step-")) >= 10


def test_a_full_disk_stops_nothing_and_loses_nothing(uninterrupted, tiny_shards, tmp_path):
    """A limit on the size of files stands in for the disk: the system refuses to write on, as it does on a full one."""
    out = tmp_path / "run"
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = command(tiny_shards, out, "--loop.steps=40", "--loop.checkpoint_every=10")
    done = run([arguments[0], "-c", limited, *arguments[1:]])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no checkpoint was written, training goes on") == 3
    assert not checkpoints(out)
    assert not leftovers(out)
    verify_checkpoint(out / "checkpoint")  # smaller than a checkpoint with the optimizer's state: it fits


def test_a_folder_that_cannot_be_written_is_refused_at_once(tiny_shards, tmp_path):
    (tmp_path / "file").write_text("here")
    done = run(command(tiny_shards, tmp_path / "file" / "run", "--loop.steps=5"))
    assert done.returncode == 1
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_finite_checkpoint(tiny_shards, tmp_path):
    """ReLU has no upper bound; at this rate it leaves the range of exp within some steps, as in the paper's ablation."""
    out = tmp_path / "run"
    done = run(
        command(
            tiny_shards,
            out,
            "--loop.steps=400",
            "--loop.checkpoint_every=1",
            "--model.activation=relu",
            "--optim.lr=5",
            "--optim.warmup_fraction=0.05",
        )  # fmt: skip
    )
    assert done.returncode == 1, done.stderr
    assert "not finite" in done.stderr
    assert "sample ids" in done.stderr
    last = checkpoints(out)[-1]
    assert f"the last finite checkpoint is {last}" in done.stderr
    step = int(done.stderr.split("step ")[1].split(":")[0])
    assert int(last.name.removeprefix("step-")) == step - 1
    verify_checkpoint(last)
    assert not (out / "checkpoint").exists()
