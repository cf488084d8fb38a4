"""Masked batches as tensors: the one module of this package that needs torch.

Three ways to them: `MaskedStream` for a training loop of one's own (ours is one), `MaskedDataset` for a DataLoader,
`shards.reader.ragged_batches` for samples without masks or torch. In each, background threads read, decode, normalise and
draw masks while the model computes; kernels release the GIL.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from shards import order, reader
from shards.ahead import ahead
from shards.buffers import BufferPool, Buffers
from shards.files import CacheConfig
from shards.manifest import MANIFEST, Corpus
from shards.reader import RaggedBatch
from txfm_data.masking import Masking

VALIDATION_EPOCH = 2**40
"""Masks of the val split are drawn as in this epoch, which no training reaches: they never change."""
STATE_VERSION = 1


@dataclass(frozen=True)
class MaskedBatch:
    """What the model sees of B samples, and what it must predict.

    gene_ids : (B, K) uint16, int64 after `to`. Token ids of the unmasked genes.
    values : (B, K) float32. ln(1 + L c / library size) of those genes.
    n_unmasked : (B,) int32. Columns beyond are padding (gene id 0, value 0) of samples with a small panel.
    panel_id : (B,) int64.
    target_indptr : (B + 1,) int64.  target_gene_ids : (nnz,) uint16, int64 after `to`.
    target_counts : (nnz,) float32. L c / library size where the count is not zero; all lie in the sample's panel.
    sample_id : (B,) int64, row of the store.  library_size : (B,) float64, counts.
    raw_counts : (nnz,) float32 where they were asked for: the counts themselves, exact to 2^24.
    is_padded : whether any sample has padding.
    epoch, number : which global batch this is a part of; both from 0.

    The memory of a batch is used again once nothing refers to its tensors, and not before.
    """

    gene_ids: torch.Tensor
    values: torch.Tensor
    n_unmasked: torch.Tensor
    panel_id: torch.Tensor
    target_indptr: torch.Tensor
    target_gene_ids: torch.Tensor
    target_counts: torch.Tensor
    sample_id: torch.Tensor
    library_size: torch.Tensor
    is_padded: bool
    epoch: int = 0
    number: int = 0
    raw_counts: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.sample_id)

    def to(self, device: torch.device | str) -> "MaskedBatch":
        """Copy to a device; gene ids become int64 there."""
        # Only CUDA's copies know what they still have to read when `to` returns.
        no_wait = torch.device(device).type == "cuda"

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = tensor.to(device, non_blocking=no_wait)
            return moved.long() if moved.dtype == torch.uint16 else moved

        return self._map(move)

    def split(self, parts: int) -> list["MaskedBatch"]:
        """Cut into `parts` batches of as many samples each, in order; they share the memory of this one.

        Raises
        ------
        ValueError
            If the samples cannot be dealt out evenly.
        """
        n, left = divmod(len(self), parts)
        if left:
            raise ValueError(f"a batch of {len(self)} samples cannot be cut into {parts} equal parts")
        return [self] if parts == 1 else [self._rows(start, start + n) for start in range(0, len(self), n)]

    def _rows(self, start: int, stop: int) -> "MaskedBatch":
        low, high = int(self.target_indptr[start]), int(self.target_indptr[stop])
        of_samples = ("gene_ids", "values", "n_unmasked", "panel_id", "sample_id", "library_size")
        rows = {name: getattr(self, name)[start:stop] for name in of_samples}
        return replace(
            self,
            **rows,
            target_indptr=self.target_indptr[start : stop + 1] - low,
            target_gene_ids=self.target_gene_ids[low:high],
            target_counts=self.target_counts[low:high],
            raw_counts=None if self.raw_counts is None else self.raw_counts[low:high],
            is_padded=bool((rows["n_unmasked"] < self.gene_ids.shape[1]).any()),
        )

    def pin_memory(self) -> "MaskedBatch":
        """Copy to page-locked memory; what a DataLoader with ``pin_memory=True`` calls."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MaskedBatch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                values[name] = function(value)
        return MaskedBatch(**values)


class _PinnedBuffers:
    """Page-locked arrays, from which a GPU copies while the CPU goes on.

    A `BufferPool` would use them again too early: a batch that was sent to the GPU has no references left while the
    copy is still to come. PyTorch's allocator of pinned memory keeps what it allotted and knows which copies are under way, so
    here a fresh tensor for each batch costs nothing.
    """

    def take(self, shape: int | Sequence[int], dtype: np.typing.DTypeLike) -> np.ndarray:
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        array: np.ndarray = torch.empty(shape, dtype=kind, pin_memory=True).numpy()
        return array


def _tensor(array: np.ndarray, is_pinned: bool) -> torch.Tensor:
    """An array as a tensor of the same memory, or of pinned memory."""
    if not is_pinned:
        return torch.from_numpy(np.require(array, requirements="W"))
    # The base of an array of `take` has the storage that PyTorch's allocator knows to be its own.
    return array.base if isinstance(array.base, torch.Tensor) else torch.from_numpy(array).pin_memory()


@dataclass(frozen=True, kw_only=True)
class _MaskSettings:
    """What is shown and given of each sample, beside the order of samples."""

    seed: int
    n_unmasked: int
    temperature: float
    scale_library: bool
    raw_counts: bool
    pin_memory: bool


class _Masker:
    """Draws the masks of batches, for one thread."""

    def __init__(self, corpus: Corpus, settings: _MaskSettings) -> None:
        n_unmasked, seed, temperature = settings.n_unmasked, settings.seed, settings.temperature
        n_nonzero = corpus.statistics.n_nonzero
        self._draw = Masking(
            corpus.panels, len(corpus.vocabulary), corpus.target_sum, n_unmasked, seed, temperature, n_nonzero
        )
        self.buffers: Buffers = _PinnedBuffers() if settings.pin_memory else BufferPool()
        self._settings, self._target_sum = settings, corpus.target_sum

    def all(self, batches: Generator[RaggedBatch, None, None], epoch: int) -> Generator[MaskedBatch, None, None]:
        with contextlib.closing(batches):  # the threads of the reader end when this does
            for batch in batches:
                yield self(batch, epoch)

    def __call__(self, batch: RaggedBatch, epoch: int) -> MaskedBatch:
        n, width, take = len(batch), self._draw.width, self.buffers.take
        samples = batch.samples
        normalized = take(samples.nnz, np.float32)
        # A library of L counts is scaled to L: counts stay what they are.
        scaled_from = batch.library_size if self._settings.scale_library else np.full(n, self._target_sum)
        gene_ids, values, n_unmasked = take((n, width), np.uint16), take((n, width), np.float32), take(n, np.int32)
        self._draw(
            samples,
            batch.panel_id,
            batch.sample_id,
            scaled_from,
            epoch,
            normalized,
            gene_ids,
            values,
            n_unmasked,
        )
        arrays = {
            "gene_ids": gene_ids, "values": values, "n_unmasked": n_unmasked, "panel_id": batch.panel_id,
            "target_indptr": samples.indptr, "target_gene_ids": samples.gene_ids, "target_counts": normalized,
            "sample_id": batch.sample_id, "library_size": batch.library_size,
        }  # fmt: skip
        if self._settings.raw_counts:
            arrays["raw_counts"] = take(samples.nnz, np.float32)
            arrays["raw_counts"][:] = samples.counts
        is_pinned = self._settings.pin_memory
        tensors: dict[str, Any] = {name: _tensor(array, is_pinned) for name, array in arrays.items()}
        is_padded = bool(n and n_unmasked.min() < width)
        return MaskedBatch(**tensors, is_padded=is_padded, epoch=epoch, number=batch.number)


class MaskedStream:
    """Masked batches of the train split, epoch by epoch.

    Samples and masks of global batch t of epoch e depend on (corpus, seed, e, t) alone, not on ranks, threads or restarts.

    global_batch : samples over all ranks; a multiple of the corpus' lanes.  n_unmasked : genes shown per sample.
    temperature : of the draw of genes; 0 is uniform.
    scale_library : scale counts to the target sum; else values are ln(1 + count) and target counts the counts themselves.
    raw_counts : give the counts too, for losses that need them.
    threads : that fetch and decode blocks, besides the one that draws masks; by default none for a local corpus, whose
    blocks that one reads as well, and four for a remote one.
    pin_memory : give tensors in page-locked memory, for a CUDA device.

    Attributes
    ----------
    wait_s : seconds that the consumer has waited for data so far.

    Raises
    ------
    ValueError
        If the lanes cannot serve this batch or world size; the error names sizes that would do.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        global_batch: int,
        n_unmasked: int,
        rank: int = 0,
        world_size: int = 1,
        temperature: float = 0.0,
        scale_library: bool = True,
        raw_counts: bool = False,
        threads: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        if n_unmasked < 1 or (threads or 0) < 0:
            raise ValueError(
                f"n_unmasked must be at least 1 and threads 0 or more, got {n_unmasked} gene(s) and {threads} thread(s)"
            )
        order.rank_lanes(corpus.lanes, rank, world_size)
        self.corpus, self.seed, self.global_batch = corpus, seed, global_batch
        self.wait_s = 0.0
        self._rank, self._world_size = rank, world_size
        self._mask = _MaskSettings(
            seed=seed, n_unmasked=n_unmasked, temperature=temperature, scale_library=scale_library, raw_counts=raw_counts,
            pin_memory=pin_memory,
        )  # fmt: skip
        self._threads = threads
        self._layouts: dict[int, order.Layout] = {}
        self.batches_in_epoch(0)

    def batches_in_epoch(self, epoch: int) -> int:
        """Global batches of an epoch, the same on every rank. Without weights it is the same in every epoch.

        Raises
        ------
        ValueError
            If the samples that this epoch serves do not fill one.
        """
        return order.batches_in_epoch(self._layout(epoch), self.global_batch, seed=self.seed, epoch=epoch)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of any epoch, for a corpus without weights.

        Raises
        ------
        ValueError
            If the corpus has weights: epochs differ then; ask `batches_in_epoch`.
        """
        if self.corpus.is_weighted:
            raise ValueError(
                "the datasets of this corpus have weights, so epochs differ in length; use batches_in_epoch(e)"
            )
        return self.batches_in_epoch(0)

    def _layout(self, epoch: int) -> order.Layout:
        if (
            epoch not in self._layouts
        ):  # the last one is kept, since it takes a look at every sample where there are weights
            self._layouts = {epoch: reader.epoch_layout(self.corpus, seed=self.seed, epoch=epoch)}
        return self._layouts[epoch]

    def epoch(self, epoch: int, start_batch: int = 0, step: int = 1) -> Generator[MaskedBatch, None, None]:
        """This rank's part of the global batches of one epoch, from `start_batch` on, every `step`-th.

        Its threads start with the first batch and end with the last, or when the iterator is closed or forgotten.
        """
        layout = self._layout(epoch)

        def produce() -> Generator[MaskedBatch, None, None]:
            mask = _Masker(self.corpus, self._mask)
            batches = reader.train_batches(
                self.corpus, seed=self.seed, epoch=epoch, global_batch=self.global_batch, rank=self._rank,
                world_size=self._world_size, start_batch=start_batch, step=step, threads=self._threads,
                buffers=mask.buffers, layout=layout,
            )  # fmt: skip
            return mask.all(batches, epoch)

        return ahead(produce, self._count_wait)

    def _count_wait(self, seconds: float) -> None:
        self.wait_s += seconds

    def state(self, epoch: int, batch: int) -> dict[str, Any]:
        """What must be kept to go on with `batch` of `epoch`: numbers and the corpus' fingerprint."""
        return {
            "version": STATE_VERSION, "epoch": epoch, "batch": batch, "seed": self.seed, "global_batch": self.global_batch,
            "corpus": self.corpus.fingerprint,
        }  # fmt: skip

    def state_after(self, batch: MaskedBatch) -> dict[str, Any]:
        """What must be kept to go on with the batch after this one, on any number of ranks."""
        return self.state(batch.epoch, batch.number + 1)

    def position(self, state: dict[str, Any]) -> tuple[int, int]:
        """(epoch, batch) of a state that belongs to this stream.

        Raises
        ------
        ValueError
            If it was made by another version, corpus, seed or batch size; both values are printed.
        """
        own = self.state(int(state.get("epoch", 0)), int(state.get("batch", 0)))
        different = {key: (state.get(key), value) for key, value in own.items() if state.get(key) != value}
        if different:
            listed = "; ".join(f"{key}: saved {old}, now {new}" for key, (old, new) in different.items())
            raise ValueError(
                f"this stream state belongs to another run ({listed}); resume with the same corpus and settings"
            )
        return int(state["epoch"]), int(state["batch"])


def validation_batches(
    corpus: Corpus,
    *,
    seed: int,
    batch_size: int,
    n_unmasked: int,
    rank: int = 0,
    world_size: int = 1,
    temperature: float = 0.0,
    scale_library: bool = True,
    raw_counts: bool = False,
    threads: int | None = None,
    pin_memory: bool = False,
) -> Generator[MaskedBatch, None, None]:
    """Every sample of the val split exactly once over the ranks, in stored order, with masks that never change."""
    settings = _MaskSettings(
        seed=seed, n_unmasked=n_unmasked, temperature=temperature, scale_library=scale_library, raw_counts=raw_counts,
        pin_memory=pin_memory,
    )  # fmt: skip

    def produce() -> Generator[MaskedBatch, None, None]:
        mask = _Masker(corpus, settings)
        batches = reader.val_batches(
            corpus, batch_size=batch_size, rank=rank, world_size=world_size, threads=threads, buffers=mask.buffers
        )
        return mask.all(batches, VALIDATION_EPOCH)

    return ahead(produce, lambda _: None)


class MaskedDataset(IterableDataset[MaskedBatch]):
    """The masked batches of one rank as a dataset for ``DataLoader(dataset, batch_size=None)``, with any number of workers.

    Worker w of n serves every n-th batch, and the DataLoader takes them in turn: the batches and their order do not
    depend on n. Every worker reads all blocks, so that threads are cheaper than workers; none are needed.

    address : of the corpus, which each process opens for itself.  cache : for one at an object store.
    The other settings are those of `MaskedStream`.

    What is served is set from outside, by `set_epoch` or `load_state_dict`; nothing counts epochs. Iterating again serves
    the same again. Worker processes see what is set, persistent ones too, when an iteration begins.
    """

    def __init__(
        self,
        address: str | Path,
        *,
        seed: int,
        global_batch: int,
        n_unmasked: int,
        rank: int = 0,
        world_size: int = 1,
        temperature: float = 0.0,
        scale_library: bool = True,
        raw_counts: bool = False,
        threads: int | None = None,
        cache: CacheConfig | None = None,
    ) -> None:
        self._address, self._cache = str(address), cache
        self._settings: dict[str, Any] = {
            "seed": seed, "global_batch": global_batch, "n_unmasked": n_unmasked, "rank": rank, "world_size": world_size,
            "temperature": temperature, "scale_library": scale_library, "raw_counts": raw_counts, "threads": threads,
        }  # fmt: skip
        # Epoch, first batch, and whether worker processes have begun to serve it; in memory that they share.
        self._shared = torch.zeros(3, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._now: tuple[int, int] | None = None
        self._loaded: tuple[int, int] | None = None
        self._fingerprint: str | None = None
        self._opened: tuple[int, MaskedStream] | None = None
        self._fingerprint = self.stream.corpus.fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    @property
    def stream(self) -> MaskedStream:
        """The stream of this process."""
        # A forked process inherits what its parent opened, which it must not use: connections cannot be shared.
        if self._opened is None or self._opened[0] != os.getpid():
            corpus = Corpus(self._address, self._cache)
            if self._fingerprint not in (None, corpus.fingerprint):
                raise ValueError(
                    f"{corpus.files.where(MANIFEST)}: the corpus was replaced: fingerprint {corpus.fingerprint}, it was "
                    f"{self._fingerprint} when this dataset was made; start again"
                )
            self._opened = os.getpid(), MaskedStream(corpus, **self._settings)
        return self._opened[1]

    def batches_in_epoch(self, epoch: int) -> int:
        """Global batches of an epoch."""
        return self.stream.batches_in_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Serve this epoch from its first batch; if it is the epoch already, a position that was loaded in it stays."""
        if epoch != int(self._shared[0]):
            self._set(epoch, 0)

    def _set(self, epoch: int, batch: int) -> None:
        self._shared[:] = torch.tensor([epoch, batch, 0])
        self._now = None

    def __iter__(self) -> Iterator[MaskedBatch]:
        worker = get_worker_info()
        number, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, start = int(self._shared[0]), int(self._shared[1]) + number
        if worker is not None:
            self._shared[2] = 1
        if self._loaded is not None:
            (epoch, start), self._loaded = self._loaded, None
        self._now = epoch, start
        return self._serve(epoch, start, step)

    def _serve(self, epoch: int, start: int, step: int) -> Iterator[MaskedBatch]:
        with contextlib.closing(self.stream.epoch(epoch, start, step)) as batches:
            for batch in batches:
                self._now = epoch, batch.number + step
                yield batch

    def state_after(self, batch: MaskedBatch) -> dict[str, Any]:
        """What must be kept to go on with the batch after this one, on any number of ranks and workers."""
        return self.stream.state_after(batch)

    def state_dict(self) -> dict[str, Any]:
        """Where this process goes on: after the last batch that it served.

        In a worker process (StatefulDataLoader asks there) it is the position of that one worker.

        Raises
        ------
        ValueError
            In the main process, once workers serve: they are ahead of the consumer by an unknown number of batches.
        """
        worker = get_worker_info()
        if worker is None and self._shared[2]:
            raise ValueError(
                "worker processes serve this dataset and are ahead of you; take state_after(batch) of the last batch you used, "
                "or the state_dict of a torchdata StatefulDataLoader"
            )
        state = self.stream.state(*(self._now or (int(self._shared[0]), int(self._shared[1]))))
        return state if worker is None else state | {"worker": worker.id, "workers": worker.num_workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: of `state_dict`, `state_after` or `MaskedStream.state`.

        Raises
        ------
        ValueError
            If it belongs to another corpus, seed or batch size; or if it is of one worker of a StatefulDataLoader and this is
            not the same worker of as many.
        """
        worker = get_worker_info()
        epoch, batch = self.stream.position(state)
        own = (0, 0) if worker is None else (worker.id, worker.num_workers)
        if "worker" in state and (state["worker"], state["workers"]) != own:
            raise ValueError(
                f"this state is of worker {state['worker']} of a StatefulDataLoader with num_workers={state['workers']} and goes "
                f"on there alone; here is worker {own[0]}, num_workers={own[1]}. To change their number, save state_after(batch)"
            )
        if worker is None:
            self._set(epoch, batch)
        else:
            self._loaded = epoch, batch if "worker" in state else batch + worker.id
