"""Masked batches as tensors: the one module of this package that needs torch.

A background thread reads, decodes, normalises and draws masks while the model computes; kernels release the GIL.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from shards import order, reader
from shards.codec import Block
from shards.manifest import Corpus
from txfm_data import kernels

VALIDATION_EPOCH = 2**40
"""Masks of the val split are drawn as in this epoch, which no training reaches: they never change."""
_AHEAD = 4


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

    def __len__(self) -> int:
        return len(self.sample_id)

    def to(self, device: torch.device | str) -> "MaskedBatch":
        """Copy to a device; gene ids become int64 there."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = value.to(device, non_blocking=True)
                value = value.long() if value.dtype == torch.uint16 else value
            moved[field.name] = value
        return MaskedBatch(**moved)


class _Masker:
    """Scratch space of the kernels, for one corpus and number of unmasked genes."""

    def __init__(self, corpus: Corpus, n_unmasked: int, seed: int) -> None:
        if n_unmasked < 1:
            raise ValueError(f"n_unmasked must be at least 1 gene, got {n_unmasked}")
        self._corpus, self._seed = corpus, seed
        self._width = min(n_unmasked, corpus.panels.largest)
        self._dense = np.zeros(len(corpus.vocabulary), np.float32)
        self._identity = np.arange(corpus.panels.largest, dtype=np.int32)
        self._swaps, self._drawn = np.empty(self._width, np.int32), np.empty(self._width, np.int32)

    def __call__(self, block: Block, epoch: int) -> MaskedBatch:
        n, ragged, panels = len(block), block.samples, self._corpus.panels
        normalized = np.empty(ragged.nnz, np.float32)
        kernels.normalize(ragged.indptr, ragged.counts, block.library_size, self._corpus.target_sum, normalized)
        gene_ids, values = np.empty((n, self._width), np.uint16), np.empty((n, self._width), np.float32)
        n_unmasked, panel_id = np.empty(n, np.int32), block.panel_id.astype(np.int64)
        kernels.mask_batch(
            ragged.indptr, ragged.gene_ids, normalized, panel_id, block.sample_id, panels.indptr, panels.gene_ids,
            self._seed, epoch, self._dense, self._identity, self._swaps, self._drawn, gene_ids, values, n_unmasked,
        )  # fmt: skip
        arrays = {
            "gene_ids": gene_ids, "values": values, "n_unmasked": n_unmasked, "panel_id": panel_id,
            "target_indptr": ragged.indptr, "target_gene_ids": ragged.gene_ids, "target_counts": normalized,
            "sample_id": block.sample_id, "library_size": block.library_size,
        }  # fmt: skip
        tensors: dict[str, Any] = {k: torch.from_numpy(np.require(a, requirements="W")) for k, a in arrays.items()}
        return MaskedBatch(**tensors, is_padded=bool(n and n_unmasked.min() < self._width))


class MaskedStream:
    """Masked batches of the train split, epoch by epoch.

    Samples and masks of global batch t of epoch e depend on (corpus, seed, e, t) alone, not on ranks or restarts.

    global_batch : samples over all ranks; a multiple of the corpus' lanes.  n_unmasked : genes shown per sample.

    Attributes
    ----------
    batches_per_epoch : global batches of an epoch, the same in every epoch and on every rank.
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
    ) -> None:
        order.rank_lanes(corpus.lanes, rank, world_size)
        self.batches_per_epoch = order.batches_per_epoch(corpus.layout, global_batch)
        self.corpus, self.seed, self.global_batch = corpus, seed, global_batch
        self.wait_s = 0.0
        self._rank, self._world_size = rank, world_size
        self._n_unmasked = n_unmasked

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[MaskedBatch]:
        """This rank's part of the global batches of one epoch, from `start_batch` on."""
        mask = _Masker(self.corpus, self._n_unmasked, self.seed)

        def produce() -> Iterator[MaskedBatch]:
            blocks = reader.train_batches(
                self.corpus, seed=self.seed, epoch=epoch, global_batch=self.global_batch, rank=self._rank,
                world_size=self._world_size, start_batch=start_batch,
            )  # fmt: skip
            for block in blocks:
                yield mask(block, epoch)

        return _ahead(produce, self._count_wait)

    def _count_wait(self, seconds: float) -> None:
        self.wait_s += seconds

    def state(self, epoch: int, batch: int) -> dict[str, Any]:
        """What must be kept to go on with `batch` of `epoch`: numbers and the corpus' fingerprint."""
        return {
            "version": 1, "epoch": epoch, "batch": batch, "seed": self.seed, "global_batch": self.global_batch,
            "corpus": self.corpus.fingerprint,
        }  # fmt: skip

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
    corpus: Corpus, *, seed: int, batch_size: int, n_unmasked: int, rank: int = 0, world_size: int = 1
) -> Iterator[MaskedBatch]:
    """Every sample of the val split exactly once over the ranks, in stored order, with masks that never change."""
    mask = _Masker(corpus, n_unmasked, seed)

    def produce() -> Iterator[MaskedBatch]:
        for block in reader.val_batches(corpus, batch_size=batch_size, rank=rank, world_size=world_size):
            yield mask(block, VALIDATION_EPOCH)

    return _ahead(produce, lambda _: None)


def _ahead(produce: Callable[[], Iterator[MaskedBatch]], waited: Callable[[float], None]) -> Iterator[MaskedBatch]:
    """Run `produce` in a thread, a few batches ahead; its exception is raised here; stops when the consumer does."""
    ready: queue.Queue[MaskedBatch | BaseException | None] = queue.Queue(_AHEAD)
    stop = threading.Event()

    def put(item: MaskedBatch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in produce():
                put(batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001  handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=work, name="txfm-stream", daemon=True)
    thread.start()
    try:
        while True:
            since = time.perf_counter()
            item = ready.get()
            waited(time.perf_counter() - since)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
