"""The stream of masked batches: pure in (corpus, seed, epoch, batch), the same on any number of ranks, exact on resume."""

import numpy as np
import pytest
import torch

from shards.manifest import Corpus
from shards.stream import MaskedBatch, MaskedStream, validation_batches

SETTINGS = {"seed": 11, "global_batch": 8, "n_unmasked": 20}


def same(a: MaskedBatch, b: MaskedBatch) -> bool:
    names = (
        "gene_ids",
        "values",
        "sample_id",
        "panel_id",
        "target_indptr",
        "target_gene_ids",
        "target_counts",
    )
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_samples_and_masks_lie_in_their_panel(tiny_shards):
    corpus = Corpus(tiny_shards)
    for batch in MaskedStream(corpus, **SETTINGS).epoch(0):
        for b in range(len(batch)):
            panel = corpus.panels.genes(int(batch.panel_id[b]))
            shown = batch.gene_ids[b].numpy()
            target = slice(int(batch.target_indptr[b]), int(batch.target_indptr[b + 1]))
            genes = batch.target_gene_ids[target].numpy()
            assert np.isin(shown, panel).all() and len(set(shown)) == 20 == int(batch.n_unmasked[b])
            assert np.isin(genes, panel).all()
            dense = np.zeros(len(corpus.vocabulary))
            dense[genes] = batch.target_counts[target]
            np.testing.assert_allclose(batch.values[b], np.log1p(dense[shown]), rtol=1e-6)
        assert not batch.is_padded


def test_an_epoch_serves_no_sample_twice_and_all_but_the_remainder(tiny_shards):
    corpus = Corpus(tiny_shards)
    stream = MaskedStream(corpus, **SETTINGS)
    ids = torch.cat([batch.sample_id for batch in stream.epoch(3)])
    assert len(ids) == stream.batches_per_epoch * 8 == len(ids.unique())
    assert corpus.n_samples("train") - len(ids) < 8 + 4 * corpus.layout.blocks_per_lane


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("epoch", [0, 1])
def test_resumed_after_every_batch_on_any_world_size_the_rest_is_the_same(tiny_shards, world_size, epoch):
    corpus = Corpus(tiny_shards)
    whole = list(MaskedStream(corpus, **SETTINGS).epoch(epoch))
    for start in range(len(whole) + 1):
        ranks = [MaskedStream(corpus, **SETTINGS, rank=r, world_size=world_size) for r in range(world_size)]
        state = ranks[0].state(epoch, start)
        rest = [list(stream.epoch(*stream.position(state))) for stream in ranks]
        assert {len(r) for r in rest} == {len(whole) - start}
        for step, expected in enumerate(whole[start:]):
            share = len(expected) // world_size
            for rank in range(world_size):
                got = rest[rank][step]
                part = slice(rank * share, (rank + 1) * share)
                for name in ("sample_id", "gene_ids", "values", "n_unmasked", "library_size"):
                    assert torch.equal(getattr(got, name), getattr(expected, name)[part])


def test_epochs_differ_in_order_and_masks(tiny_shards):
    stream = MaskedStream(Corpus(tiny_shards), **SETTINGS)
    first, second = next(iter(stream.epoch(0))), next(iter(stream.epoch(1)))
    assert not torch.equal(first.sample_id, second.sample_id)
    assert same(first, next(iter(stream.epoch(0))))


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_serves_every_sample_once_with_fixed_masks(tiny_shards, world_size):
    corpus = Corpus(tiny_shards)
    options = {"seed": 1, "batch_size": 5, "n_unmasked": 7}
    ranks = [list(validation_batches(corpus, **options, rank=r, world_size=world_size)) for r in range(world_size)]
    ids = torch.cat([batch.sample_id for batches in ranks for batch in batches])
    assert len(ids) == corpus.n_samples("val") == len(ids.unique())
    alone = list(validation_batches(corpus, **options))
    assert all(same(a, b) for a, b in zip(ranks[0], alone[::world_size], strict=True))


def test_a_small_panel_is_shown_whole_and_padded(tiny_shards):
    corpus = Corpus(tiny_shards)
    batch = next(iter(MaskedStream(corpus, seed=0, global_batch=8, n_unmasked=5_000).epoch(0)))
    assert batch.gene_ids.shape == (8, 60) and set(batch.n_unmasked.tolist()) == {60}
    for b in range(8):
        np.testing.assert_array_equal(batch.gene_ids[b], corpus.panels.genes(int(batch.panel_id[b])))


def test_on_a_device_ids_are_int64(tiny_shards):
    batch = next(iter(MaskedStream(Corpus(tiny_shards), **SETTINGS).epoch(0)))
    moved = batch.to("cpu")
    assert batch.gene_ids.dtype == torch.uint16
    assert moved.gene_ids.dtype == moved.target_gene_ids.dtype == torch.int64
    assert torch.equal(moved.gene_ids, batch.gene_ids.long()) and len(moved) == 8


def test_a_state_of_another_run_is_refused_printing_both(tiny_shards):
    corpus = Corpus(tiny_shards)
    stream = MaskedStream(corpus, **SETTINGS)
    with pytest.raises(ValueError, match="corpus: saved abc, now " + corpus.fingerprint):
        stream.position(stream.state(0, 1) | {"corpus": "abc"})
    with pytest.raises(ValueError, match="seed: saved 5, now 11"):
        stream.position(stream.state(0, 1) | {"seed": 5})
    with pytest.raises(ValueError, match="version: saved None"):
        stream.position({"epoch": 0, "batch": 0})


def test_bad_settings_are_refused_at_the_start(tiny_shards):
    corpus = Corpus(tiny_shards)
    for wrong, message in (
        ({"global_batch": 6}, "multiple of 4"),
        ({"world_size": 3}, "start one of"),
        ({"rank": 1}, "rank 1"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedStream(corpus, **(SETTINGS | wrong))
    with pytest.raises(ValueError, match="at least 1 gene"):
        next(iter(MaskedStream(corpus, **(SETTINGS | {"n_unmasked": 0})).epoch(0)))


def test_damage_met_in_the_background_reaches_the_consumer(tiny_shards, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    corpus = Corpus(copy)
    name, entry = corpus.blocks("train")[0]
    data = bytearray((copy / name).read_bytes())
    data[entry.offset + 700] ^= 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged"):
        list(MaskedStream(corpus, **SETTINGS).epoch(0))


def test_stopping_early_ends_the_thread(tiny_shards):
    import threading

    batches = MaskedStream(Corpus(tiny_shards), **SETTINGS).epoch(0)
    next(batches)
    batches.close()
    assert "txfm-stream" not in [thread.name for thread in threading.enumerate()]
