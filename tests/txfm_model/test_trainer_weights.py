"""Training on a corpus whose datasets have weights, and with masks that favour frequent genes."""

import json
from pathlib import Path

import pytest
import torch

from shards.manifest import Corpus
from shards.stream import MaskedStream
from tests.shards.corpus_maker import Plan, make_corpus
from txfm_model.config import LoopConfig, MaskConfig, ModelConfig, TrainConfig
from txfm_model.trainer import train


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory) -> Path:
    return make_corpus(
        tmp_path_factory.mktemp("weights") / "corpus", Plan(batch_rows=32, block_rows=12, weights=(0.5, 1.0))
    )


def run(shards: Path, out: Path, temperature: float = 0.0, **loop) -> tuple[dict, bytes]:
    config = TrainConfig(
        shards=str(shards), out=str(out), model=ModelConfig(width=16, blocks=2, heads=2, decoder_blocks=1),
        mask=MaskConfig(n_unmasked=20, temperature=temperature),
        loop=LoopConfig(global_batch=8, log_every=1, validate_every=100, seed=3, cpu_threads=1, **loop),
    )  # fmt: skip
    return train(config), (out / "checkpoint" / "model.safetensors").read_bytes()


def test_epochs_that_differ_in_length_are_counted_one_by_one(weighted, tmp_path):
    stream = MaskedStream(Corpus(weighted), seed=3, global_batch=8, n_unmasked=20)
    lengths = [stream.batches_in_epoch(epoch) for epoch in range(3)]
    assert len(set(lengths)) > 1
    result, _ = run(weighted, tmp_path / "run", epochs=2.5)
    assert result["steps"] == round(lengths[0] + lengths[1] + 0.5 * lengths[2])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = {line["step"]: line["epoch"] for line in lines if line["split"] == "train"}
    assert epochs[lengths[0]] == 1.0
    assert epochs[lengths[0] + lengths[1]] == 2.0
    assert epochs[lengths[0] + 1] == pytest.approx(1 + 1 / lengths[1])


def test_the_temperature_reaches_the_masks(weighted, tmp_path):
    uniform, frequent, again = (
        run(weighted, tmp_path / name, temperature, steps=3)
        for name, temperature in (("a", 0.0), ("b", 1.0), ("c", 1.0))
    )
    assert frequent[1] == again[1] != uniform[1]
    assert frequent[0]["val_loss"] == again[0]["val_loss"] != uniform[0]["val_loss"]
