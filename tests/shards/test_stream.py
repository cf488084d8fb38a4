"""The stream of masked batches: pure in (corpus, seed, epoch, batch), the same on any number of ranks, exact on resume."""

import shutil
import threading
import time

import numpy as np
import pytest
import torch

from shards.manifest import Corpus
from shards.stream import MaskedBatch, MaskedStream, validation_batches
from tests.shards.corpus_maker import Plan, make_corpus, panel_of, sample_of

SETTINGS = {"seed": 11, "global_batch": 8, "n_unmasked": 20}
TENSORS = (
    "gene_ids", "values", "n_unmasked", "panel_id", "target_indptr", "target_gene_ids", "target_counts", "sample_id",
    "library_size",
)  # fmt: skip
OF_SAMPLES = ("sample_id", "gene_ids", "values", "n_unmasked", "panel_id", "library_size")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus(make_corpus(tmp_path_factory.mktemp("stream") / "plain"))


@pytest.fixture(scope="module")
def weighted(tmp_path_factory) -> Corpus:
    plan = Plan(batch_rows=32, block_rows=12, weights=(0.5, 1.0))
    return Corpus(make_corpus(tmp_path_factory.mktemp("stream") / "weighted", plan))


def same(a: MaskedBatch, b: MaskedBatch) -> bool:
    return (a.epoch, a.number) == (b.epoch, b.number) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS
    )


def is_part(part: MaskedBatch, whole: MaskedBatch, rank: int, world_size: int) -> bool:
    """Whether this is what one rank has of a global batch."""
    share = len(whole) // world_size
    samples = slice(rank * share, (rank + 1) * share)
    first, last = whole.target_indptr[rank * share], whole.target_indptr[(rank + 1) * share]
    return (
        part.number == whole.number
        and all(torch.equal(getattr(part, name), getattr(whole, name)[samples]) for name in OF_SAMPLES)
        and torch.equal(part.target_gene_ids, whole.target_gene_ids[first:last])
        and torch.equal(part.target_counts, whole.target_counts[first:last])
    )


@pytest.mark.parametrize("n_unmasked", [20, 300, 5_000])
def test_what_is_shown_and_asked_of_each_sample(corpus, n_unmasked):
    settings = SETTINGS | {"n_unmasked": n_unmasked}
    batches = list(MaskedStream(corpus, **settings).epoch(0))
    assert {batch.is_padded for batch in batches} == {n_unmasked > 200}
    for batch in batches:
        assert batch.gene_ids.shape == (8, min(n_unmasked, 400))
        for b in range(len(batch)):
            panel = panel_of(int(batch.panel_id[b]))
            n_shown = int(batch.n_unmasked[b])
            shown = batch.gene_ids[b, :n_shown].numpy()
            assert n_shown == min(n_unmasked, len(panel)) == len(set(shown.tolist()))
            assert np.isin(shown, panel).all()
            assert not batch.gene_ids[b, n_shown:].any() and not batch.values[b, n_shown:].any()
            sample_id = int(batch.sample_id[b])
            sample, dense = sample_of(sample_id, sample_id // 56), np.zeros(400)
            dense[sample.gene_ids] = sample.counts * 1e5 / (1.0 + sample_id)
            target = slice(int(batch.target_indptr[b]), int(batch.target_indptr[b + 1]))
            np.testing.assert_array_equal(batch.target_gene_ids[target], sample.gene_ids)
            np.testing.assert_allclose(batch.target_counts[target], dense[sample.gene_ids], rtol=1e-6)
            np.testing.assert_allclose(batch.values[b, :n_shown], np.log1p(dense[shown]), rtol=1e-6)
            raw = batch.target_counts[target].double() * batch.library_size[b] / 1e5
            np.testing.assert_array_equal(raw.round(), sample.counts)


def test_an_epoch_serves_no_sample_twice_and_all_but_the_remainder(corpus):
    stream = MaskedStream(corpus, **SETTINGS)
    left = set()
    for epoch in range(5):
        ids = torch.cat([batch.sample_id for batch in stream.epoch(epoch)])
        assert len(ids) == stream.batches_per_epoch * 8 == stream.batches_in_epoch(epoch) * 8 == 80
        assert len(ids.unique()) == 80
        left.add(frozenset(range(112)) - set(ids.tolist()))
    assert len(left) > 1


@pytest.mark.parametrize("kind", ["corpus", "weighted"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resumed_at_every_batch_on_any_number_of_ranks_the_rest_is_the_same(request, kind, world_size):
    corpus = request.getfixturevalue(kind)
    whole = list(MaskedStream(corpus, **SETTINGS).epoch(1))
    ranks = [
        MaskedStream(corpus, **SETTINGS, rank=r, world_size=world_size, threads=3 * (r % 2)) for r in range(world_size)
    ]
    assert {stream.batches_in_epoch(1) for stream in ranks} == {len(whole)}
    for start in range(len(whole) + 1):
        state = ranks[0].state_after(whole[start - 1]) if start else ranks[0].state(1, 0)
        assert state == ranks[-1].state(1, start)
        rest = [list(stream.epoch(*stream.position(state))) for stream in ranks]
        assert {len(r) for r in rest} == {len(whole) - start}
        for step, expected in enumerate(whole[start:]):
            assert all(is_part(rest[rank][step], expected, rank, world_size) for rank in range(world_size))


def test_order_and_masks_differ_between_epochs_and_seeds(corpus):
    def first_masks(seed: int, epoch: int) -> tuple[str, dict[int, str]]:
        batches = list(MaskedStream(corpus, **(SETTINGS | {"seed": seed})).epoch(epoch))
        masks = {
            int(i): str(genes)
            for batch in batches
            for i, genes in zip(batch.sample_id, batch.gene_ids.tolist(), strict=True)
        }
        return str(list(masks)), masks

    found = {(seed, epoch): first_masks(seed, epoch) for seed in (1, 2) for epoch in (0, 1)}
    assert len({order for order, _ in found.values()}) == 4
    for sample in range(1, 42):
        masks = [masks[sample] for _, masks in found.values() if sample in masks]
        assert len(set(masks)) == len(masks)
    again = first_masks(2, 1)
    assert again == found[2, 1]


def test_a_temperature_changes_masks_and_not_samples(corpus):
    cold, hot = (MaskedStream(corpus, **SETTINGS, temperature=t) for t in (0.0, 1.0))
    for a, b in zip(cold.epoch(0), hot.epoch(0), strict=True):
        assert torch.equal(a.sample_id, b.sample_id)
        assert not torch.equal(a.gene_ids, b.gene_ids)
    # Genes of even number are in both panels, so they were seen in twice as many samples.
    n_nonzero = corpus.statistics.n_nonzero
    assert n_nonzero[0] == 2 * n_nonzero[1]

    def even(stream: MaskedStream) -> float:
        genes = torch.cat([batch.gene_ids[batch.panel_id == 0] for batch in stream.epoch(0)]).to(torch.int32)
        return float((genes % 2 == 0).float().mean())

    assert even(cold) == pytest.approx(0.5, abs=0.05)
    assert even(hot) == pytest.approx(2 / 3, abs=0.05)
    options = {"seed": 1, "batch_size": 5, "n_unmasked": 20}
    pairs = zip(
        validation_batches(corpus, **options), validation_batches(corpus, **options, temperature=1.0), strict=True
    )
    assert not any(torch.equal(a.gene_ids, b.gene_ids) for a, b in pairs)


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_serves_every_sample_once_with_fixed_masks(corpus, world_size):
    options = {"seed": 1, "batch_size": 5, "n_unmasked": 7}
    ranks = [list(validation_batches(corpus, **options, rank=r, world_size=world_size)) for r in range(world_size)]
    ids = torch.cat([batch.sample_id for batches in ranks for batch in batches])
    assert len(ids) == corpus.n_samples("val") == len(ids.unique())
    alone = list(validation_batches(corpus, **options, threads=3))
    assert all(same(a, b) for a, b in zip(ranks[0], alone[::world_size], strict=True))


def test_epochs_of_a_weighted_corpus_differ_in_length(weighted):
    stream = MaskedStream(weighted, **SETTINGS)
    lengths = [stream.batches_in_epoch(epoch) for epoch in range(6)]
    assert [len(list(stream.epoch(epoch))) for epoch in range(6)] == lengths
    assert len(set(lengths)) > 1
    with pytest.raises(ValueError, match=r"epochs differ in length; use batches_in_epoch\(e\)"):
        _ = stream.batches_per_epoch


def test_on_a_device_ids_are_int64(corpus):
    batch = next(MaskedStream(corpus, **SETTINGS).epoch(0))
    moved = batch.to("cpu")
    assert batch.gene_ids.dtype == torch.uint16
    assert moved.gene_ids.dtype == moved.target_gene_ids.dtype == torch.int64
    assert torch.equal(moved.gene_ids, batch.gene_ids.long()) and len(moved) == 8
    assert (moved.epoch, moved.number, moved.is_padded) == (0, 0, False)


@pytest.mark.gpu
def test_pinned_batches_reach_the_gpu_as_they_are(corpus):
    pinned = MaskedStream(corpus, **SETTINGS, pin_memory=True).epoch(0)
    plain = list(MaskedStream(corpus, **SETTINGS).epoch(0))
    moved = []
    for batch in pinned:
        assert all(getattr(batch, name).is_pinned() for name in TENSORS)
        moved.append(batch.to("cuda"))  # and its own memory may be used again while the copy is under way
        del batch
    for a, b in zip(moved, plain, strict=True):
        assert same(a.to("cpu"), b.to("cpu"))


def test_a_state_of_another_run_is_refused_printing_both(corpus):
    stream = MaskedStream(corpus, **SETTINGS)
    assert stream.state(2, 1) == {
        "version": 1, "epoch": 2, "batch": 1, "seed": 11, "global_batch": 8, "corpus": corpus.fingerprint,
    }  # fmt: skip
    with pytest.raises(ValueError, match="corpus: saved abc, now " + corpus.fingerprint):
        stream.position(stream.state(0, 1) | {"corpus": "abc"})
    with pytest.raises(ValueError, match="seed: saved 5, now 11"):
        stream.position(stream.state(0, 1) | {"seed": 5})
    with pytest.raises(ValueError, match="version: saved None"):
        stream.position({"epoch": 0, "batch": 0})


def test_bad_settings_are_refused_at_the_start(corpus):
    for wrong, message in (
        (
            {"global_batch": 6},
            r"global batch of 6 samples cannot be shared by 4 lanes; use a multiple of 4, for example \[4, 8\]",
        ),
        ({"global_batch": 400}, "84 samples in 4 lanes, too few for one global batch of 400; use at most 84"),
        ({"world_size": 3}, r"3 processes cannot share 4 lanes evenly; start one of \[1, 2, 4\]"),
        ({"rank": 1}, "rank 1 of 1 processes does not exist"),
        ({"n_unmasked": 0}, "must be at least 1 and threads 0 or more, got 0 gene"),
        ({"threads": -1}, r"and -1 thread\(s\)"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedStream(corpus, **(SETTINGS | wrong))


def test_damage_met_in_the_background_reaches_the_consumer(corpus, tmp_path):
    copy = shutil.copytree(corpus.path, tmp_path / "copy")
    damaged = Corpus(copy)
    name, entry = damaged.blocks("train")[0]
    data = bytearray((copy / name).read_bytes())
    data[entry.offset + 700] ^= 1
    (copy / name).write_bytes(bytes(data))
    served = []
    with pytest.raises(ValueError, match=f"{name}: block at byte 0: .*damaged"):
        served.extend(MaskedStream(damaged, **SETTINGS).epoch(0))
    assert all(same(a, b) for a, b in zip(served, MaskedStream(corpus, **SETTINGS).epoch(0), strict=False))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("txfm")]


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_stopping_early_ends_the_threads(corpus, taken):
    batches = MaskedStream(corpus, **SETTINGS, threads=3).epoch(0)
    for _ in range(taken):
        next(batches)
    if taken:
        time.sleep(0.05)  # the queue is full, and the thread waits for room
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("txfm")]


def test_batches_that_are_kept_stay_as_they_were(tmp_path):
    big = Corpus(make_corpus(tmp_path / "big", Plan(datasets=1, batch_rows=2000, batches=3, block_rows=1000)))
    stream = MaskedStream(big, **(SETTINGS | {"global_batch": 400, "n_unmasked": 200}))
    kept = list(stream.epoch(0))
    places = {batch.values.data_ptr() for batch in kept}
    assert len(places) == len(kept) == 10
    copies = [MaskedBatch(**{**vars(b), **{n: getattr(b, n).clone() for n in TENSORS}}) for b in kept]
    used = {batch.values.data_ptr() for batch in stream.epoch(0)}
    assert len(used) < 10  # the stream uses its own again, but not what is kept
    assert not used & places
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))
    assert all(same(a, b) for a, b in zip(stream.epoch(0), copies, strict=True))


def test_waiting_is_counted(corpus):
    stream = MaskedStream(corpus, **SETTINGS)
    list(stream.epoch(0))
    assert 0 < stream.wait_s < 60


def test_the_first_batch_of_a_thousand_shards_reads_few_of_them(tmp_path, monkeypatch):
    plan = Plan(datasets=1, batches=2, batch_rows=2000, block_rows=2, blocks_per_shard=1, lanes=4)
    corpus = Corpus(make_corpus(tmp_path / "many", plan))
    assert len(corpus.shards("train")) == 1000
    read, plainly = [], type(corpus.files).read
    monkeypatch.setattr(type(corpus.files), "read", lambda files, *place: read.append(place) or plainly(files, *place))
    batches = MaskedStream(corpus, **SETTINGS).epoch(3)
    next(batches)
    batches.close()
    # A few batches are drawn ahead, each of two samples a lane; a lane mixes two blocks of two samples
    assert 4 <= len(read) <= 4 * 3 * 5
