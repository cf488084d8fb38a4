"""The loss of a tiny run, step by step, as it was: a change of numerics shows here and is then meant.

`TXFM_WRITE_GOLDEN=1 pytest tests/txfm_model/test_golden.py` writes the file again; say why under "Numerics" in the
change log.
"""

import json
import os
from pathlib import Path

import numpy as np

from txfm_model.config import LoopConfig, MaskConfig, ModelConfig, TrainConfig
from txfm_model.trainer import train

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tiny_run.json"


def test_losses_of_a_tiny_run_are_as_they_were(tiny_shards, tmp_path):
    config = TrainConfig(
        shards=str(tiny_shards),
        out=str(tmp_path / "run"),
        model=ModelConfig(width=16, blocks=2, heads=2, decoder_blocks=1, layerscale_init=0.1, codebook_std=0.5),
        mask=MaskConfig(n_unmasked=20),
        loop=LoopConfig(steps=12, global_batch=8, log_every=1, validate_every=6, precision="no", seed=7),
    )
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {split: [line["loss"] for line in lines if line["split"] == split] for split in ("train", "val")}
    if os.environ.get("TXFM_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    assert {split: len(losses) for split, losses in expected.items()} == {"train": 12, "val": 2}
    for split, losses in expected.items():
        # Processors round matrix products differently; on one machine the numbers repeat to the last bit.
        np.testing.assert_allclose(found[split], losses, rtol=2e-4)
