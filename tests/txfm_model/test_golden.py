"""The losses of tiny runs, step by step, as they were: a change of numerics shows here and is then meant.

`TXFM_WRITE_GOLDEN=1 pytest tests/txfm_model/test_golden.py` writes the files again; say why under "Numerics" in the
change log.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from txfm_model.config import CHOICES, LoopConfig, LossConfig, MaskConfig, ModelConfig, TrainConfig
from txfm_model.trainer import train

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
STEPS = 12


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_config(shards: Path, out: Path, kind: str = "poisson", **model) -> TrainConfig:
    shape = {"width": 16, "blocks": 2, "heads": 2, "decoder_blocks": 1, "layerscale_init": 0.1, "codebook_std": 0.5}
    return TrainConfig(
        shards=str(shards),
        out=str(out),
        model=ModelConfig(**(shape | model)),
        mask=MaskConfig(n_unmasked=20),
        loss=LossConfig(kind=kind),
        loop=LoopConfig(
            steps=STEPS, global_batch=8, log_every=1, validate_every=6, precision="no", seed=7, cpu_threads=1
        ),
    )


def check(config: TrainConfig, name: str) -> None:
    """Compare the losses of a run with `golden/NAME.txt`: split, step and loss on each line."""
    train(config)
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("TXFM_WRITE_GOLDEN"):
        path.write_text("".join(f"{line['split']:<5} {line['step']:>2} {line['loss']:.9g}\n" for line in lines))
    expected = [line.split() for line in path.read_text().splitlines()]
    assert len(expected) == STEPS + STEPS // 6
    assert [(split, int(step)) for split, step, _ in expected] == [(line["split"], line["step"]) for line in lines]
    # Processors round matrix products differently; on one machine the numbers repeat to the last bit.
    np.testing.assert_allclose([line["loss"] for line in lines], [float(loss) for *_, loss in expected], rtol=2e-4)


def test_losses_of_a_tiny_run_are_as_they_were(tiny_shards, tmp_path):
    check(make_config(tiny_shards, tmp_path / "run"), "tiny_run")


@pytest.mark.parametrize("activation", CHOICES["activation"])
@pytest.mark.parametrize("kind", CHOICES["kind"])
def test_losses_of_every_loss_and_activation_are_as_they_were(tiny_shards, tmp_path, kind, activation):
    check(make_config(tiny_shards, tmp_path / "run", kind, activation=activation), f"{kind}_{activation}")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("concat", {"tokens": "concat"}),
        ("linear_decoder", {"decoder_blocks": 0}),
        ("log1p", {"preprocessing": "log1p"}),
        ("zero_head", {"head_init": "zero"}),
        ("tanh_scale", {"tanh_scale": 11.5}),
    ],
)
def test_losses_of_other_shapes_are_as_they_were(tiny_shards, tmp_path, name, model):
    check(make_config(tiny_shards, tmp_path / "run", **model), name)
