"""What `txfm bench loader` is made of: the simulated corpus, rounds in turns, the process of its own; and the stream's memory
and delays at the sizes that its goals name (slow)."""

import sys

import numpy as np
import pytest

from shards.bench.corpus import DropletConfig, simulate_pool, write_corpus
from shards.bench.fresh import Request, stream_afresh
from shards.bench.goals import Goal
from shards.bench.peer import Peer
from shards.bench.rounds import Spent, alternate, in_turn
from shards.manifest import Corpus
from shards.reader import train_batches

TINY = DropletConfig(samples=600, genes=800, block_rows=32)
MB = 1_000_000

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_simulated_samples_are_like_those_of_droplets():
    pool = simulate_pool(512, 20_000, 0)
    pool.check(20_000, "the pool")
    assert 2_200 < pool.nnz / len(pool) < 2_560
    assert 0.66 < (pool.counts == 1).mean() < 0.72
    assert 0.92 < (pool.counts <= 5).mean() < 0.96
    assert pool.counts.max() > 255
    genes = np.bincount(pool.gene_ids, minlength=20_000)
    assert np.sort(genes)[-100:].sum() > 40 * np.median(genes) * 100 / 10  # a few genes are everywhere
    assert not np.array_equal(simulate_pool(512, 20_000, 1).gene_ids[:99], pool.gene_ids[:99])


def test_a_simulated_corpus_is_sound_and_the_same_every_time(tmp_path):
    corpus = Corpus(write_corpus(tmp_path / "a", TINY))
    assert corpus.fingerprint == Corpus(write_corpus(tmp_path / "b", TINY)).fingerprint
    assert len(corpus.manifest.datasets) == 5
    assert sum(len(entry.batches) for entry in corpus.manifest.datasets) == 40
    seen, mixed = [], []
    for batch in train_batches(corpus, seed=0, epoch=0, global_batch=64, with_obs=True):
        seen.append(batch.sample_id)
        mixed.append(len(set(batch.obs["batch"].to_pylist())))
        assert np.array_equal(batch.dataset, batch.sample_id * 40 // 600 // 8)
        sums = np.add.reduceat(batch.samples.counts, batch.samples.indptr[:-1])
        assert np.array_equal(batch.library_size, sums)
    ids = np.concatenate(seen)
    assert len(np.unique(ids)) == len(ids) == 576 and ids.max() < 600
    assert min(mixed) > 20  # of 40: about 32 are expected of 64 samples


def test_blocks_draw_from_the_pool_without_replacement(tmp_path):
    corpus = Corpus(write_corpus(tmp_path / "c", DropletConfig(samples=2_000, genes=800, block_rows=64, pool=64)))
    batch = next(train_batches(corpus, seed=0, epoch=0, global_batch=512))
    sizes = set(batch.library_size)
    assert len(sizes) <= 64  # samples are of the pool, which is smaller than the corpus
    assert len({entry.crc32 for _, entry in corpus.blocks("train")}) == len(corpus.blocks("train"))


@pytest.mark.parametrize("wrong", [{"samples": 10}, {"genes": 70_000}, {"batches": 7}, {"pool": 10}])
def test_corpora_that_cannot_be_simulated(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        DropletConfig(**wrong)


def test_rounds_alternate_and_the_first_does_not_count():
    order = []

    def work(name: str, seconds: list[float]):
        def run(number: int) -> Spent:
            order.append((name, number))
            return Spent(10, seconds[number], 2 * seconds[number])

        return run

    found = alternate({"a": work("a", [9, 1, 5, 2]), "b": work("b", [9, 1, 1, 10])}, rounds=3)
    assert order == [(name, number) for number in range(4) for name in "ab"]
    assert (found["a"].per_s, found["a"].per_cpu_s) == (5.0, 2.5)
    assert found["b"].rounds_per_cpu_s == (5.0, 5.0, 0.5)
    assert in_turn(30, 60) == pytest.approx(20)


def test_a_goal_is_met_or_missed_or_neither():
    assert Goal(name="a", about="", value=2, goal=2).is_met
    assert Goal(name="a", about="", value=3, goal=2, is_least=False).is_met is False
    assert Goal(name="a", about="", value=None, goal=2).is_met is None
    assert Goal(name="a", about="", value=3).is_met is None


ECHO = """
import json, sys
print(json.dumps({"versions": {"x": "1"}}), flush=True)
for line in sys.stdin:
    number = json.loads(line)["epoch"]
    if number == 2:
        raise RuntimeError("no epoch two")
    print(json.dumps({"samples": 10, "nonzero": 50, "wall_s": number, "cpu_s": 2}), flush=True)
"""


def test_a_peer_runs_epochs_and_says_why_it_ends():
    with Peer("other", [sys.executable, "-c", ECHO]) as peer:
        assert peer.hello == {"versions": {"x": "1"}}
        assert peer.epoch(1) == Spent(10, 1, 2)
        assert (peer.samples, peer.nonzero) == (10, 5.0)
        with pytest.raises(ValueError, match="other ended early: RuntimeError: no epoch two"):
            peer.epoch(2)
        with pytest.raises(ValueError, match="other ended early"):
            peer.epoch(3)
    with pytest.raises(ValueError, match="ended early: hello"):
        Peer("other", [sys.executable, "-c", "print('hello')"])


@needs_proc
def test_streaming_in_a_process_of_its_own(tmp_path):
    folder = write_corpus(tmp_path / "c", TINY)
    request = Request(shards=str(folder), batch=64, n_unmasked=32, seed=0, n_paced=3, interval_s=0.01)
    found = stream_afresh(request)
    assert found.samples == 576
    assert len(found.waits_s) == 3 and min(found.waits_s) >= 0
    assert found.peak_bytes > 0 and found.imports_bytes > 10 * MB
    assert found.first_batch_s > 0
    with pytest.raises(ValueError, match="in a process of its own failed: .*no such file"):
        stream_afresh(Request(shards=str(tmp_path / "nothing"), batch=64, n_unmasked=32, seed=0))


@needs_proc
@pytest.mark.slow
def test_memory_of_the_stream_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for samples in (100_000, 1_000_000):
        folder = write_corpus(tmp_path / str(samples), DropletConfig(samples=samples))
        found = stream_afresh(Request(shards=str(folder), batch=512, n_unmasked=2_048, seed=0, n_paced=1))
        assert found.samples > samples - 512 - 1_024
        peaks.append(found.peak_bytes)
        print(
            f"\n{samples:,} samples: {found.peak_bytes / MB:,.0f} MB above imports, first batch {found.first_batch_s:.2f} s"
        )
    assert max(peaks) <= 400 * MB
    assert abs(peaks[1] - peaks[0]) < 0.15 * peaks[0]


@pytest.mark.slow
def test_the_first_batch_of_a_thousand_shards(tmp_path):
    config = DropletConfig(samples=32 * 1_008, block_rows=32, pool=1_024, shard_bytes=1)
    folder = write_corpus(tmp_path / "c", config)
    assert len(Corpus(folder).shards("train")) == 1_008
    request = Request(shards=str(folder), batch=512, n_unmasked=2_048, seed=0, n_batches=1)
    first = min(stream_afresh(request).first_batch_s for _ in range(3))
    print(f"\nfirst batch of 1,008 shards after {first:.2f} s")
    assert first <= 2


@pytest.mark.slow
def test_a_steady_consumer_is_not_kept_waiting(tmp_path):
    folder = write_corpus(tmp_path / "c", DropletConfig(samples=100_000))
    request = Request(shards=str(folder), batch=512, n_unmasked=2_048, seed=0)
    # Other work on the machine makes waits longer, nothing shorter.
    longest = min(max(stream_afresh(request).waits_s) for _ in range(3))
    print(f"\nlongest wait {1_000 * longest:.1f} ms")
    assert longest <= 0.02
