"""`txfm train`: what it prints, the dry run, starting from a checkpoint."""

import json

import numpy as np
import pytest
import torch

from shards.select import ShardConfig
from shards.writer import build_shards
from tests.conftest import gene_id, make_adata
from tools.train import main
from txfm_data import ingest
from txfm_data.store.opening import open_store
from txfm_model.model import TxFM

SHAPE = ["--model.width=16", "--model.blocks=2", "--model.heads=2", "--model.decoder_blocks=1", "--mask.n_unmasked=20"]
SHAPE += ["--loop.global_batch=8", "--loop.validate_every=100", "--loop.precision=no", "--loop.cpu_threads=1"]


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(tiny_shards, tmp_path, capsys):
    arguments = [*SHAPE, f"--shards={tiny_shards}", f"--out={tmp_path / 'run'}", "--loop.steps=12", "--dry-run"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "nothing was trained or written" in said
    assert "12 steps of 8 samples" in said
    assert "hours" in said
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 96
    assert list(tmp_path.iterdir()) == []


def test_a_run_starts_from_a_checkpoint_of_another_corpus(tiny_shards, tmp_path, capsys):
    """At a rate of nearly nothing, what the new model shares with the old one is what the old one had."""
    assert main([*SHAPE, f"--shards={tiny_shards}", f"--out={tmp_path / 'first'}", "--loop.steps=3"]) == 0
    make_adata(3, range(60, 120)).write_h5ad(tmp_path / "other.h5ad")  # the corpus of the first run has genes 0 to 89
    ingest.h5ad(tmp_path / "other.h5ad", tmp_path / "other.soma", "other", batch="batch")
    build_shards(open_store(tmp_path / "other.soma"), tmp_path / "other.shards", ShardConfig(block_rows=8, lanes=4))
    capsys.readouterr()
    still = ["--optim.lr=1e-12", "--optim.weight_decay=0", "--loop.steps=1"]
    options = [
        *SHAPE,
        f"--shards={tmp_path / 'other.shards'}",
        f"--out={tmp_path / 'second'}",
        f"--init={tmp_path / 'first'}",
        *still,
    ]
    assert main(options) == 0
    assert "30 genes kept their rows, 30 were new, 60 of its own were left out" in capsys.readouterr().out
    first, second = TxFM.from_pretrained(tmp_path / "first"), TxFM.from_pretrained(tmp_path / "second")
    pairs = [(second.encoder.blocks[0].mlp[0].weight, first.encoder.blocks[0].mlp[0].weight)]
    places = [[model.vocabulary.gene_ids.index(gene_id(i)) for i in range(60, 90)] for model in (second, first)]
    for name in ("tokens.codebook", "head.weight", "head.bias"):
        pairs.append(tuple(m.get_parameter(name)[place] for m, place in zip((second, first), places, strict=True)))
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours.detach(), theirs.detach(), atol=1e-8)
    assert second.provenance["init"]["shared_genes"] == 30
    fresh = second.tokens.codebook.detach()[[second.vocabulary.gene_ids.index(gene_id(i)) for i in range(90, 120)]]
    assert fresh.std() == pytest.approx(0.02, rel=0.2)
