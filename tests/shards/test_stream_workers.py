"""The stream in PyTorch's DataLoader and in torchdata's StatefulDataLoader: real worker processes, the same batches."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from shards.manifest import Corpus
from shards.stream import MaskedBatch, MaskedDataset, MaskedStream
from tests.shards.corpus_maker import Plan, make_corpus, reseal

SETTINGS = {"seed": 11, "global_batch": 8, "n_unmasked": 20}
TENSORS = ("gene_ids", "values", "n_unmasked", "target_indptr", "target_gene_ids", "target_counts", "sample_id")

# torch warns where there are more workers than cores, and of what torchdata 0.11 still calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("workers") / "corpus")


@pytest.fixture(scope="module")
def whole(folder) -> dict[int, list[MaskedBatch]]:
    """Every batch of three epochs, from the stream itself."""
    stream = MaskedStream(Corpus(folder), **SETTINGS)
    return {epoch: list(stream.epoch(epoch)) for epoch in range(3)}


def same(found: list[MaskedBatch], expected: list[MaskedBatch]) -> bool:
    return [(b.epoch, b.number) for b in found] == [(b.epoch, b.number) for b in expected] and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(found, expected, strict=True) for name in TENSORS
    )  # fmt: skip


def plain(dataset: MaskedDataset, workers: int, **options) -> DataLoader:
    return DataLoader(dataset, batch_size=None, num_workers=workers, **options)


def stateful(dataset: MaskedDataset, workers: int, **options) -> StatefulDataLoader:
    return StatefulDataLoader(dataset, batch_size=None, num_workers=workers, **options)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("threads", [None, 3])
def test_ranks_workers_and_threads_change_nothing(folder, whole, workers, threads):
    for world_size in (1, 2, 4):
        ranks = [
            list(plain(MaskedDataset(folder, **SETTINGS, threads=threads, rank=r, world_size=world_size), workers))
            for r in range(world_size)
        ]
        for step, expected in enumerate(whole[0]):
            parts = [rank[step] for rank in ranks]
            assert {part.number for part in parts} == {step}
            for name in ("sample_id", "gene_ids", "values", "n_unmasked", "target_gene_ids", "target_counts"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))
        assert {len(rank) for rank in ranks} == {len(whole[0])}


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_spawned_workers_serve_the_same(folder, whole, persistent):
    dataset = MaskedDataset(folder, **SETTINGS)
    loader = plain(dataset, 2, multiprocessing_context="spawn", persistent_workers=persistent)
    assert same(list(loader), whole[0])
    dataset.load_state_dict(dataset.state_after(whole[2][3]))
    assert same(list(loader), whole[2][4:])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_that_stay_see_the_epoch_that_is_set(folder, whole, workers):
    dataset = MaskedDataset(folder, **SETTINGS)
    loader = plain(dataset, workers, persistent_workers=workers > 0)
    assert same(list(loader), whole[0])
    assert same(list(loader), whole[0])  # nothing counts epochs
    dataset.set_epoch(2)
    assert same(list(loader), whole[2])
    dataset.load_state_dict(dataset.state_after(whole[1][5]))
    dataset.set_epoch(1)  # as a loop over epochs does; the position stays
    assert same(list(loader), whole[1][6:])
    dataset.set_epoch(2)
    assert same(list(itertools.islice(loader, 4)), whole[2][:4])
    dataset.set_epoch(0)  # in the midst of an epoch
    assert same(list(loader), whole[0])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_state_goes_on_with_any_number_of_workers(folder, whole, workers):
    other = MaskedDataset(folder, **SETTINGS)
    state = other.state_after(whole[1][2])
    assert state == other.stream.state(1, 3)
    dataset = MaskedDataset(folder, **SETTINGS)
    dataset.load_state_dict(state)
    assert same(list(plain(dataset, workers)), whole[1][3:])


def test_the_state_of_the_process_that_serves_follows_what_it_serves(folder, whole):
    dataset = MaskedDataset(folder, **SETTINGS)
    dataset.set_epoch(1)
    for number, batch in enumerate(dataset):
        state = dataset.state_dict()
        assert state == dataset.state_after(batch) == dataset.stream.state(1, number + 1)
        resumed = MaskedDataset(folder, **SETTINGS)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert same(list(resumed), whole[1][number + 1 :])
    dataset.set_epoch(2)
    assert dataset.state_dict() == dataset.stream.state(2, 0)


def test_a_process_whose_workers_are_ahead_does_not_pretend_to_know(folder, whole):
    dataset = MaskedDataset(folder, **SETTINGS)
    loader = iter(plain(dataset, 1))
    batch = next(loader)
    with pytest.raises(ValueError, match=r"ahead of you; take state_after\(batch\)"):
        dataset.state_dict()
    assert dataset.state_after(batch) == dataset.stream.state(0, 1)
    del loader
    dataset.set_epoch(1)
    assert dataset.state_dict() == dataset.stream.state(1, 0)


@pytest.mark.parametrize(("workers", "every"), [(0, 1), (1, 1), (3, 1), pytest.param(3, 4, marks=pytest.mark.slow)])
def test_a_stateful_loader_resumed_at_every_batch_serves_the_rest(folder, whole, workers, every):
    def make() -> tuple[MaskedDataset, StatefulDataLoader]:
        dataset = MaskedDataset(folder, **SETTINGS)
        return dataset, stateful(dataset, workers, snapshot_every_n_steps=every)

    dataset, loader = make()
    dataset.set_epoch(1)
    served = iter(loader)
    for number in range(len(whole[1])):
        if number:
            next(served)
        state = loader.state_dict()
        resumed, other = make()
        other.load_state_dict(state)
        resumed.set_epoch(1)
        assert same(list(other), whole[1][number:])
        if number == 5:
            resumed.set_epoch(2)
            assert same(list(other), whole[2])


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_stateful_loader_with_workers_that_stay(folder, whole, context):
    options = {"persistent_workers": True, "multiprocessing_context": context}
    dataset = MaskedDataset(folder, **SETTINGS)
    loader = stateful(dataset, 3, **options)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert same(list(itertools.islice(loader, 5 if epoch else None)), whole[epoch][: 5 if epoch else None])
    state = loader.state_dict()
    resumed = MaskedDataset(folder, **SETTINGS)
    other = stateful(resumed, 3, **options)
    other.load_state_dict(state)
    for epoch in (1, 2):
        resumed.set_epoch(epoch)
        assert same(list(other), whole[epoch][5 if epoch == 1 else 0 :])


@pytest.mark.slow  # PyTorch takes 5 s to end workers after an error
@pytest.mark.parametrize(("saved", "now"), [(2, 1), (1, 2)])
def test_a_stateful_loader_goes_on_with_as_many_workers_only(folder, saved, now):
    loader = stateful(MaskedDataset(folder, **SETTINGS), saved)
    served = iter(loader)
    next(served)
    state = loader.state_dict()
    other = stateful(MaskedDataset(folder, **SETTINGS), now)
    other.load_state_dict(state)
    with pytest.raises(
        ValueError, match=rf"worker \d of a StatefulDataLoader with num_workers={saved} .* num_workers={now}"
    ):
        next(iter(other))


def test_what_does_not_fit_is_refused_at_the_start(folder, tmp_path):
    for wrong, message in (
        ({"global_batch": 6}, "multiple of 4"),
        ({"world_size": 3}, "start one of"),
        ({"threads": -1}, "0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedDataset(folder, **(SETTINGS | wrong))
    with pytest.raises(FileNotFoundError, match="txfm shard"):
        MaskedDataset(tmp_path / "nothing", **SETTINGS)
    dataset = MaskedDataset(folder, **SETTINGS)
    for wrong in ({"seed": 5}, {"global_batch": 4}, {"corpus": "abc"}, {"version": 9}):
        with pytest.raises(ValueError, match="belongs to another run"):
            dataset.load_state_dict(dataset.state_dict() | wrong)


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_damage_met_by_a_worker_reaches_the_consumer(folder, tmp_path, workers):
    copy = shutil.copytree(folder, tmp_path / "copy")
    dataset = MaskedDataset(copy, **SETTINGS)
    name, entry = dataset.stream.corpus.blocks("train")[0]
    data = bytearray((copy / name).read_bytes())
    data[entry.offset + 700] ^= 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=f"{name}: block at byte 0: .*damaged"):
        list(plain(dataset, workers))


@pytest.mark.slow
def test_a_corpus_that_is_replaced_under_a_dataset_is_refused_by_its_workers(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    dataset = MaskedDataset(copy, **SETTINGS)
    reseal(copy, seed=99)
    with pytest.raises(ValueError, match="the corpus was replaced: fingerprint"):
        list(plain(dataset, 1))


def test_weights_and_workers(tmp_path):
    folder = make_corpus(tmp_path / "weighted", Plan(batch_rows=32, block_rows=12, weights=(0.5, 1.0)))
    dataset = MaskedDataset(folder, **SETTINGS)
    dataset.set_epoch(3)
    assert same(list(plain(dataset, 2)), list(MaskedStream(Corpus(folder), **SETTINGS).epoch(3)))
    assert len(list(dataset)) == dataset.batches_in_epoch(3)
