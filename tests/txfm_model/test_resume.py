"""A run that stopped and went on is the run that never stopped: same weights, same lines, same files."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from txfm_model.config import LoopConfig, LossConfig, MaskConfig, ModelConfig, OptimConfig, TrainConfig
from txfm_model.trainer import train

STEPS = 12
LOOP = {
    "steps": STEPS, "global_batch": 16, "log_every": 5, "validate_every": 6, "seed": 3, "cpu_threads": 1,
    "checkpoint_every": 1, "keep_checkpoints": 100, "precision": "no",
}  # fmt: skip
TIMES = {"samples_per_s", "data_wait_fraction"}


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_config(shards: Path, out: Path, *, resume: str | None = None, loss: str = "poisson", **loop) -> TrainConfig:
    return TrainConfig(
        shards=str(shards),
        out=str(out),
        model=ModelConfig(width=16, blocks=2, heads=2, decoder_blocks=1, stochastic_depth=0.3, layerscale_init=0.1),
        mask=MaskConfig(n_unmasked=20),
        optim=OptimConfig(clip_norm=50.0),
        loss=LossConfig(kind=loss),
        loop=LoopConfig(**(LOOP | loop)),
        resume=resume,
    )


def lines(out: Path) -> list[dict]:
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in written]


def weights(out: Path) -> bytes:
    return (out / "checkpoint" / "model.safetensors").read_bytes()


def steps_of(out: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in (out / "checkpoints").glob("step-*"))


def stopped_at(whole: Path, step: int, out: Path) -> Path:
    """The folder as a run leaves it that was killed right after the checkpoint of `step`."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint")
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(out / "checkpoints" / f"step-{later:08d}", ignore_errors=True)
    return out


@pytest.fixture(scope="module")
def whole(tiny_shards, tmp_path_factory) -> Path:
    """A run of 12 steps over more than one epoch, with a checkpoint after each step. Read it only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    result = train(make_config(tiny_shards, out))
    torch.set_num_threads(threads)
    assert result["steps"] == STEPS
    assert lines(out)[-1]["epoch"] > 1.2  # so that a resume falls on the last batch of an epoch as well
    return out


def test_a_checkpoint_after_every_step_but_the_last(whole):
    assert steps_of(whole) == list(range(1, STEPS))


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resumed_at_any_step_it_is_bit_for_bit_the_same_run(whole, tiny_shards, tmp_path, step):
    out = stopped_at(whole, step, tmp_path / "run")
    torch.manual_seed(step)  # whatever the process did before
    result = train(make_config(tiny_shards, out, resume="auto"))
    assert result["resumed_from_step"] == step
    assert weights(out) == weights(whole)
    assert lines(out) == lines(whole)
    last = out / "checkpoints" / f"step-{STEPS - 1:08d}" / "optimizer.safetensors"
    assert last.read_bytes() == (whole / "checkpoints" / last.parent.name / last.name).read_bytes()


def test_runs_without_checkpoints_are_the_same_run(whole, tiny_shards, tmp_path):
    train(make_config(tiny_shards, tmp_path / "run", checkpoint_every=None))
    assert weights(tmp_path / "run") == weights(whole)
    assert lines(tmp_path / "run") == lines(whole)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_parts_of_a_step_give_the_same_curve(whole, tiny_shards, tmp_path):
    train(make_config(tiny_shards, tmp_path / "run", accumulation=4))
    for here, there in zip(lines(tmp_path / "run"), lines(whole), strict=True):
        for name in ("loss", "excess"):
            assert here[name] == pytest.approx(there[name], rel=2e-5), (name, here["step"])


def test_a_run_goes_on_with_another_number_of_parts(whole, tiny_shards, tmp_path):
    out = stopped_at(whole, 5, tmp_path / "run")
    train(make_config(tiny_shards, out, resume="auto", accumulation=2))
    assert lines(out)[-1]["loss"] == pytest.approx(lines(whole)[-1]["loss"], rel=2e-5)
    history = json.loads((out / "checkpoint" / "config.json").read_text())["provenance"]["history"]
    assert [(part["from_step"], part["accumulation"]) for part in history] == [(0, 1), (5, 2)]


def test_auto_passes_over_damaged_checkpoints(whole, tiny_shards, tmp_path, caplog):
    out = stopped_at(whole, 8, tmp_path / "run")
    flipped = out / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (out / "checkpoints" / "step-00000007" / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        result = train(make_config(tiny_shards, out, resume="auto"))
    assert result["resumed_from_step"] == 6
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("step-00000008" in text for text in warned)
    assert any("step-00000007" in text for text in warned)
    assert weights(out) == weights(whole)
    assert steps_of(out) == list(range(1, STEPS))


def test_auto_starts_a_run_where_there_is_none(whole, tiny_shards, tmp_path):
    result = train(make_config(tiny_shards, tmp_path / "run", resume="auto"))
    assert result["resumed_from_step"] == 0
    assert weights(tmp_path / "run") == weights(whole)


def test_auto_on_a_finished_run_gives_its_results(whole, tiny_shards, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    result = train(make_config(tiny_shards, tmp_path / "run", resume="auto"))
    assert result["already_finished"]
    assert result["val_loss"] == lines(whole)[-1]["loss"]
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before


def test_one_checkpoint_by_name(whole, tiny_shards, tmp_path):
    out = stopped_at(whole, 9, tmp_path / "run")
    result = train(make_config(tiny_shards, out, resume=str(out / "checkpoints" / "step-00000004")))
    assert result["resumed_from_step"] == 4
    assert weights(out) == weights(whole)
    assert lines(out) == lines(whole)


def test_a_run_that_started_from_a_model_goes_on_from_one_checkpoint_by_name(whole, tiny_shards, tmp_path):
    config = dataclasses.replace(make_config(tiny_shards, tmp_path / "tuned", steps=4), init=str(whole / "checkpoint"))
    train(config)
    folder = str(tmp_path / "tuned" / "checkpoints" / "step-00000002")
    train(dataclasses.replace(config, out=str(tmp_path / "again"), resume=folder))
    assert weights(tmp_path / "again") == weights(tmp_path / "tuned")
    assert (
        json.loads((tmp_path / "again/checkpoint/config.json").read_text())["provenance"]["init"]["shared_genes"] == 90
    )
    with pytest.raises(ValueError, match="init: saved .*, now None"):
        train(dataclasses.replace(config, out=str(tmp_path / "other"), resume=folder, init=None))


def test_old_checkpoints_go_once_newer_ones_are_there(tiny_shards, tmp_path):
    train(make_config(tiny_shards, tmp_path / "run", checkpoint_every=2, keep_checkpoints=2))
    assert steps_of(tmp_path / "run") == [8, 10]


def test_an_unfinished_run_is_not_started_anew(whole, tiny_shards, tmp_path):
    out = stopped_at(whole, 3, tmp_path / "run")
    with pytest.raises(FileExistsError, match="--resume auto"):
        train(make_config(tiny_shards, out))
    assert steps_of(out) == [1, 2, 3]


def test_a_checkpoint_of_another_folder_is_not_mixed_with_those_here(whole, tiny_shards, tmp_path):
    """Its later steps would count as newer than what this run writes."""
    out = stopped_at(whole, 3, tmp_path / "run")
    with pytest.raises(FileExistsError, match="choose another folder"):
        train(make_config(tiny_shards, out, resume=str(whole / "checkpoints" / "step-00000002")))
    assert steps_of(out) == [1, 2, 3]
    train(make_config(tiny_shards, tmp_path / "new", resume=str(whole / "checkpoints" / "step-00000002")))
    assert weights(tmp_path / "new") == weights(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "loop.seed"),
        ({"steps": 13}, "loop.steps"),
        ({"global_batch": 8}, "loop.global_batch"),
        ({"loss": "mse"}, "loss.kind"),
    ],
)
def test_another_run_is_refused(whole, tiny_shards, tmp_path, change, named):
    out = stopped_at(whole, 3, tmp_path / "run")
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=named):
        train(make_config(tiny_shards, out, resume="auto", **change))
    assert steps_of(out) == [1, 2, 3]
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_changed_corpus_is_refused(whole, tiny_store, tmp_path):
    from shards.select import ShardConfig
    from shards.writer import build_shards
    from txfm_data.store.opening import open_store

    out = stopped_at(whole, 3, tmp_path / "run")
    other = tmp_path / "other.shards"
    build_shards(open_store(tiny_store), other, ShardConfig(val_batches=0.25, block_rows=8, lanes=4, seed=6))
    with pytest.raises(ValueError, match="fingerprint"):
        train(make_config(other, out, resume="auto"))
    assert steps_of(out) == [1, 2, 3]


def test_a_line_that_a_kill_cut_off_is_dropped(whole, tiny_shards, tmp_path, caplog):
    out = stopped_at(whole, 7, tmp_path / "run")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "step": 7, "lo')
    train(make_config(tiny_shards, out, resume="auto"))
    assert lines(out) == lines(whole)
    assert any("cut off" in record.message for record in caplog.records)


@pytest.mark.parametrize("loss", ["mse", "nb", "zinb"])
def test_other_losses_resume_as_well(tiny_shards, tmp_path, loss):
    whole = tmp_path / "whole"
    train(make_config(tiny_shards, whole, loss=loss))
    out = stopped_at(whole, 5, tmp_path / "run")
    train(make_config(tiny_shards, out, loss=loss, resume="auto"))
    assert weights(out) == weights(whole)
    assert lines(out) == lines(whole)


def test_weights_follow_the_run_not_the_layout(whole):
    tensors = load_file(whole / "checkpoint" / "model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
