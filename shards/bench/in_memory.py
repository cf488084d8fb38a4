"""Kernels alone, on blocks of a corpus that lie in memory: drawing, masking, decoding, each beside its floor."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.bench import floor
from shards.bench.plain_numpy import mask_in_numpy
from shards.codec import Block, decode
from shards.entries import TAR_BLOCK, BlockEntry
from shards.manifest import Corpus
from shards.packing import unpack, unpack_into
from txfm_data.kernels import draw_rows
from txfm_data.masking import Masking
from txfm_data.ragged import Ragged

N_SAMPLES = 4_096
"""About as many samples are held; their unpacked counts are larger than a cache."""


@dataclass(frozen=True)
class _Batch:
    """Some samples of a block, unpacked; `counts16` are theirs in 16 bits, as the floor takes them."""

    samples: Ragged
    counts16: np.ndarray
    panel_id: np.ndarray
    sample_id: np.ndarray
    library_size: np.ndarray


class InMemory:
    """Work on the first blocks of a corpus. Each method is one run, which returns its samples.

    batch : samples that are masked at once.  n_unmasked : genes shown.
    """

    def __init__(self, corpus: Corpus, *, batch: int, n_unmasked: int, seed: int) -> None:
        self._corpus, self._schema, self._seed = corpus, corpus.schema, seed
        self._payloads: list[tuple[bytes, BlockEntry]] = []
        self._batches: list[_Batch] = []
        n_samples, largest, most = 0, 0, 0
        for name, entry in corpus.blocks("train"):
            if n_samples >= N_SAMPLES:
                break
            payload = corpus.files.read(name, entry.offset + TAR_BLOCK, entry.bytes)
            self._payloads.append((payload, entry))
            block = self._decode(payload, entry)
            self._batches += [_unpacked(block, rows) for rows in _pieces(len(block), batch)]
            n_samples += len(block)
            largest, most = max(largest, block.packed.nnz), max(most, len(block))
        self.n_samples, self._batch = n_samples, batch
        panels, n_genes = corpus.panels, self._schema.n_genes
        self._masking = Masking(panels, n_genes, corpus.target_sum, n_unmasked, seed)
        width, rows = self._masking.width, min(batch, most)
        self._gene_ids, self._counts = np.empty(largest, np.uint16), np.empty(largest, self._counts_dtype)
        self._normalized = np.empty(largest, np.float32)
        self._shown, self._values = np.empty((rows, width), np.uint16), np.empty((rows, width), np.float32)
        self._n_unmasked = np.empty(rows, np.int32)
        self._identity, self._swaps = np.arange(panels.largest, dtype=np.uint16), np.empty(width + 1, np.uint32)
        self._permutation, self._generator = np.arange(n_genes, dtype=np.uint16), np.array([floor.SEED])
        self._drawn_from = np.arange(panels.largest, dtype=np.uint16)
        self._dense, self._logs = np.zeros(n_genes, np.float32), np.empty(floor.N_LOGS, np.float32)
        self._rng = np.random.Generator(np.random.SFC64(seed))

    @property
    def works(self) -> dict[str, Callable[[int], int]]:
        """The runs by the names of their rows."""
        return {
            "draw": self.draw, "draw_floor": self.draw_floor, "mask": self.mask, "mask_floor": self.mask_floor,
            "mask_numpy": self.mask_numpy, "decode": self.decode, "decode_mask": self.decode_and_mask,
        }  # fmt: skip

    @property
    def _counts_dtype(self) -> type[np.generic]:
        return np.float64 if self._schema.has_fractions else np.uint32

    def draw(self, number: int) -> int:
        """Our draw of genes alone, from the largest panel."""
        for batch in self._batches:
            out = self._shown[: len(batch.sample_id)]
            draw_rows(self._seed, number, batch.sample_id, self._identity, self._swaps, out)
        return self.n_samples

    def draw_floor(self, number: int) -> int:
        """Its floor."""
        for batch in self._batches:
            floor.draw(self._drawn_from, self._generator, self._shown[: len(batch.sample_id)])
        return self.n_samples

    def mask(self, number: int) -> int:
        """Our normalising and masking."""
        for batch in self._batches:
            self._mask(batch.samples, batch.panel_id, batch.sample_id, batch.library_size, number)
        return self.n_samples

    def mask_floor(self, number: int) -> int:
        """Its floor."""
        for batch in self._batches:
            n = len(batch.sample_id)
            floor.full_lut(
                batch.samples.indptr, batch.samples.gene_ids, batch.counts16, self._corpus.target_sum, self._permutation,
                self._generator, self._dense, self._logs, self._shown[:n], self._values[:n],
            )  # fmt: skip
        return self.n_samples

    def mask_numpy(self, number: int) -> int:
        """Normalising and masking in NumPy."""
        for batch in self._batches:
            n = len(batch.sample_id)
            mask_in_numpy(
                batch.samples, self._corpus.panels, batch.panel_id, batch.library_size, self._corpus.target_sum, self._rng,
                self._dense, self._shown[:n], self._values[:n],
            )  # fmt: skip
        self._dense.fill(0)  # as the floor must find it
        return self.n_samples

    def decode(self, number: int) -> int:
        """Blocks from bytes to gene ids and counts."""
        for payload, entry in self._payloads:
            block = self._decode(payload, entry)
            unpack_into(block.packed, np.arange(len(block)), self._gene_ids, self._counts)
        return self.n_samples

    def decode_and_mask(self, number: int) -> int:
        """Blocks from bytes to masked batches: what the stream does, without order, files and threads."""
        for payload, entry in self._payloads:
            block = self._decode(payload, entry)
            for rows in _pieces(len(block), self._batch):
                nnz = unpack_into(block.packed, rows, self._gene_ids, self._counts)
                indptr = block.packed.indptr[rows[0] : rows[-1] + 2] - block.packed.indptr[rows[0]]
                samples = Ragged(indptr, self._gene_ids[:nnz], self._counts[:nnz])
                self._mask(
                    samples,
                    block.panel_id[rows].astype(np.int64),
                    block.sample_id[rows],
                    block.library_size[rows],
                    number,
                )
        return self.n_samples

    def _decode(self, payload: bytes, entry: BlockEntry) -> Block:
        return decode(payload, self._schema, n_samples=entry.samples, where="a block in memory")

    def _mask(
        self, samples: Ragged, panel_id: np.ndarray, sample_id: np.ndarray, library_size: np.ndarray, epoch: int
    ) -> None:
        n = len(sample_id)
        self._masking(
            samples, panel_id, sample_id, library_size, epoch, self._normalized[: samples.nnz], self._shown[:n], self._values[:n],
            self._n_unmasked[:n],
        )  # fmt: skip


def _pieces(n: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, n)) for start in range(0, n, size)]


def _unpacked(block: Block, rows: np.ndarray) -> _Batch:
    samples = unpack(block.packed, rows)
    counts16 = np.minimum(samples.counts, 65_535).astype(np.uint16)
    # Owned and writable, as arrays from elsewhere are, so that kernels are compiled for one kind of array.
    columns = block.panel_id[rows].astype(np.int64), block.sample_id[rows], block.library_size[rows]
    return _Batch(samples, counts16, *columns)
