"""A run on a tiny corpus: what it leaves, what it refuses, and that it is a function of its configuration."""

import dataclasses
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from shards.manifest import open_corpus
from shards.stream import MaskedStream
from txfm_model import metrics, run, step
from txfm_model.checkpoint import verify_checkpoint
from txfm_model.config import LoopConfig, MaskConfig, ModelConfig, TrainConfig, config_from_dict, config_to_dict
from txfm_model.losses import Loss
from txfm_model.model import TxFM
from txfm_model.trainer import train

LOOP = {"steps": 12, "global_batch": 8, "log_every": 5, "validate_every": 6, "seed": 3, "cpu_threads": 1}


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_config(shards: Path, out: Path, **loop) -> TrainConfig:
    return TrainConfig(
        shards=str(shards),
        out=str(out),
        model=ModelConfig(width=16, blocks=2, heads=2, decoder_blocks=1),
        mask=MaskConfig(n_unmasked=20),
        loop=LoopConfig(**(LOOP | loop)),
    )


def read_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_leaves(tiny_shards, tmp_path):
    config, seen = make_config(tiny_shards, tmp_path / "run"), []
    result = train(config, progress=lambda done, total: seen.append((done, total)))
    json.dumps(result)
    corpus = open_corpus(tiny_shards)
    assert seen == [(step, 12) for step in range(1, 13)]
    assert (result["steps"], result["samples"], result["processes"]) == (12, 96, 1)
    assert (result["precision"], result["device"]) == ("no", "cpu") or torch.cuda.is_available()
    assert result["samples_per_s"] > 0

    lines = read_lines(tmp_path / "run")
    assert [(line["split"], line["step"]) for line in lines] == [
        ("train", 5),
        ("val", 6),
        ("train", 10),
        ("train", 12),
        ("val", 12),
    ]
    first, last = lines[0], lines[-1]
    assert set(first) == {
        "split", "step", "epoch", "loss", "excess", "loss_sum", "grad_norm", "dead_gene_fraction", "lr",
        "samples_per_s", "data_wait_fraction",
    }  # fmt: skip
    assert first["excess"] > 0
    assert 0 <= first["data_wait_fraction"] <= 1
    assert 0 <= first["dead_gene_fraction"] <= 1
    assert (last["loss"], last["excess"]) == (result["val_loss"], result["val_excess"])
    assert set(last["excess_by_dataset"]) == {"first", "second"}
    of_datasets = {entry.name: entry.n_val for entry in corpus.manifest.datasets}
    assert sum(last["excess_by_dataset"][name] * n for name, n in of_datasets.items()) == pytest.approx(
        last["excess"] * sum(of_datasets.values()), rel=1e-5
    )
    assert last["panel_mean_excess"] == result["panel_mean_val_excess"] > 0
    assert last["loss"] - last["excess"] == pytest.approx(last["panel_mean_loss"] - last["panel_mean_excess"], rel=1e-5)
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))

    info = verify_checkpoint(result["checkpoint"])
    assert info["parameters"] == result["parameters"]
    assert info["corpus_fingerprint"] == corpus.fingerprint
    assert info["vocabulary_fingerprint"] == corpus.vocabulary.fingerprint
    assert config_from_dict(TrainConfig, info["training"]) == config
    assert info["results"]["val_loss"] == result["val_loss"]
    model = TxFM.from_pretrained(tmp_path / "run")
    assert model.statistics.mean_log1p.tolist() == corpus.statistics.mean_log1p.tolist()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint", "metrics.jsonl", "tensorboard"]


def weights(out: Path) -> bytes:
    return (out / "checkpoint" / "model.safetensors").read_bytes()


def test_a_run_is_a_function_of_its_configuration(tiny_shards, tmp_path):
    train(make_config(tiny_shards, tmp_path / "a"))
    torch.manual_seed(123)  # whatever the caller did before
    train(make_config(tiny_shards, tmp_path / "b", log_every=3, validate_every=100))
    train(make_config(tiny_shards, tmp_path / "c", seed=4))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_training_lowers_the_loss(tiny_shards, tmp_path):
    result = train(make_config(tiny_shards, tmp_path / "run", steps=60, validate_every=60, log_every=10))
    assert result["train_loss"] < read_lines(tmp_path / "run")[0]["loss"]


def test_epochs_and_bf16(tiny_shards, tmp_path):
    result = train(make_config(tiny_shards, tmp_path / "run", steps=None, epochs=1.5, precision="bf16"))
    stream = MaskedStream(open_corpus(tiny_shards), seed=0, global_batch=8, n_unmasked=20)
    assert result["precision"] == "bf16"
    assert result["steps"] == round(1.5 * stream.batches_per_epoch)
    assert read_lines(tmp_path / "run")[-1]["epoch"] == pytest.approx(1.5, abs=0.1)


@pytest.mark.gpu
def test_a_gpu_trains_in_bf16_near_what_the_cpu_gives(tiny_shards, tmp_path):
    on_gpu = train(make_config(tiny_shards, tmp_path / "gpu"))
    assert (on_gpu["device"], on_gpu["precision"]) == ("cuda", "bf16")
    exact = train(make_config(tiny_shards, tmp_path / "exact", precision="no"))
    assert on_gpu["val_loss"] == pytest.approx(exact["val_loss"], rel=0.01)


def test_a_finished_run_is_not_written_over(tiny_shards, tmp_path):
    config = make_config(tiny_shards, tmp_path / "run", steps=1)
    train(config)
    before = weights(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        train(config)
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        train(dataclasses.replace(config, out=str(tmp_path / "run" / "checkpoint")))
    assert (weights(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_bytes()) == before


def test_refusals_before_anything_is_written(tiny_shards, tmp_path):
    config = make_config(tiny_shards, tmp_path / "run")
    tree = config_to_dict(config)
    other_sum = config_from_dict(TrainConfig, tree | {"model": tree["model"] | {"target_sum": 1e4}})
    with pytest.raises(ValueError, match="scaled to 100000, model.target_sum is 10000"):
        train(other_sum)
    with pytest.raises(ValueError, match="loop.global_batch 4096|do not fill|batch"):
        train(make_config(tiny_shards, tmp_path / "run", global_batch=4096))
    with pytest.raises(ValueError, match="lanes"):
        train(make_config(tiny_shards, tmp_path / "run", global_batch=7))
    with pytest.raises((ValueError, FileNotFoundError), match="nothing_here"):
        train(make_config(tmp_path / "nothing_here", tmp_path / "run"))
    with pytest.raises(ValueError, match="is a URL"):
        train(make_config(tiny_shards, "s3://bucket/run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        train(make_config(tiny_shards, tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interruption_leaves_no_checkpoint_and_the_folder_can_be_used_again(tiny_shards, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    config = make_config(tiny_shards, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=interrupt)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert len(read_lines(tmp_path / "run")) == 2
    train(config)
    assert len(read_lines(tmp_path / "run")) == 5
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples(tiny_shards, tmp_path, monkeypatch):
    plain, steps = Loss.__call__, []

    def poisoned(loss, prediction, batch, panels_NG):
        parts = plain(loss, prediction, batch, panels_NG)
        steps.append(batch.sample_id)
        if len(steps) == 3:
            bad = torch.zeros(8)
            bad[[2, 5]] = torch.nan
            return dataclasses.replace(parts, mean_B=parts.mean_B + bad)
        return parts

    monkeypatch.setattr(Loss, "__call__", poisoned)
    with pytest.raises(ValueError, match="step 3: the loss is not finite for sample ids") as error:
        train(make_config(tiny_shards, tmp_path / "run"))
    for sample in steps[2][[2, 5]].tolist():
        assert str(sample) in str(error.value)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(step.nn.utils, "get_total_norm", lambda gradients: torch.tensor(torch.inf))
    with pytest.raises(ValueError, match="step 1: the gradient is not finite"):
        train(make_config(tiny_shards, tmp_path / "run"))


def test_dead_genes_are_counted(tiny_shards, tmp_path, monkeypatch):
    def start_dead(model, **options):
        initialise(model, **options)
        with torch.no_grad():
            model.head.bias[:45] = -100.0  # half of the 90 genes

    initialise = run.initialise
    monkeypatch.setattr(run, "initialise", start_dead)
    train(make_config(tiny_shards, tmp_path / "run", steps=20, log_every=20, validate_every=20))
    assert read_lines(tmp_path / "run")[0]["dead_gene_fraction"] == pytest.approx(0.5, abs=0.05)


def test_without_tensorboard_there_are_json_lines_only(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    train(make_config(tiny_shards, tmp_path / "run", steps=1))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint", "metrics.jsonl"]


def test_secrets_of_a_url_do_not_reach_the_checkpoint():
    from txfm_model.provenance import without_secrets

    assert without_secrets("s3://me:pass@bucket/corpus.shards?X-Amz-Signature=abc") == "s3://bucket/corpus.shards"
    assert without_secrets("/data/corpus.shards") == "/data/corpus.shards"


def test_the_record_of_origin():
    from txfm_model.provenance import git_commit, package_versions

    assert package_versions()["torch"] == torch.__version__
    assert package_versions()["python"] == sys.version.split()[0]
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch's own, as it compiles
def test_a_compiled_run_gives_what_an_eager_one_gives(tiny_shards, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        compiled = train(make_config(tiny_shards, tmp_path / "compiled", steps=4, compile=True, log_every=1))
    eager = train(make_config(tiny_shards, tmp_path / "eager", steps=4, log_every=1))
    assert any("with its compilation, took" in record.message for record in caplog.records)
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-4)
    for ours, theirs in zip(read_lines(tmp_path / "compiled"), read_lines(tmp_path / "eager"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_activation_checkpointing_changes_nothing(tiny_shards, tmp_path):
    train(make_config(tiny_shards, tmp_path / "again", activation_checkpointing=True))
    train(make_config(tiny_shards, tmp_path / "kept"))
    assert weights(tmp_path / "again") == weights(tmp_path / "kept")
