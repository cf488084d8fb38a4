"""One block of about a thousand samples as bytes and back: an Arrow IPC stream of one record batch, zstd inside.

The format is docs/format_shards.md; its version stands in the schema's metadata.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shards import packing
from txfm_data.ragged import Ragged

BLOCK_VERSION = b"1"
MAX_BLOCK_BYTES = 256 * 1024**2
_ZSTD_LEVEL = 5
SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("dataset", pa.int32()),
        ("panel_id", pa.int32()),
        ("batch", pa.dictionary(pa.int32(), pa.string())),
        ("library_size", pa.float64()),
        ("nnz", pa.int32()),
        ("genes", pa.binary()),
        ("counts", pa.binary()),
    ],
    metadata={"txfm_block": BLOCK_VERSION},
)


@dataclass(frozen=True)
class Block:
    """Samples of one block.

    sample_id : (n,) int64, row of the store.  dataset, panel_id : (n,) int32, of the manifest.
    batch : (n,) str, experimental batch.  library_size : (n,) float64, counts.
    samples : their counts over the vocabulary of the corpus.
    """

    sample_id: np.ndarray
    dataset: np.ndarray
    panel_id: np.ndarray
    batch: np.ndarray
    library_size: np.ndarray
    samples: Ragged

    def __len__(self) -> int:
        return len(self.sample_id)


def encode(block: Block) -> bytes:
    """Bytes of a block; the same block always gives the same bytes."""
    ragged = block.samples
    packed = []
    for pack, values, width in (
        (packing.pack_genes, ragged.gene_ids, 3),
        (packing.pack_counts, ragged.counts, 5),
    ):
        out, offsets = np.empty(width * ragged.nnz, np.uint8), np.empty(len(ragged) + 1, np.int32)
        pack(ragged.indptr, values, out, offsets)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(out[: offsets[-1]])]
        packed.append(pa.BinaryArray.from_buffers(pa.binary(), len(ragged), buffers))
    batch = pa.array(block.batch, pa.string()).dictionary_encode().cast(SCHEMA.field("batch").type)
    columns = [
        pa.array(block.sample_id, pa.int64()), pa.array(block.dataset, pa.int32()), pa.array(block.panel_id, pa.int32()), batch,
        pa.array(block.library_size, pa.float64()), pa.array(np.diff(ragged.indptr), pa.int32()), *packed,
    ]  # fmt: skip
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=_ZSTD_LEVEL))
    with pa.ipc.new_stream(sink, SCHEMA, options=options) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
    return bytes(sink.getvalue())


def decode(data: bytes, *, n_samples: int, n_genes: int, n_panels: int, where: str) -> Block:
    """Inverse of `encode`, with every size checked before it is believed.

    n_samples : that the manifest promises.  n_genes : of the vocabulary.  n_panels : of the corpus.

    Raises
    ------
    ValueError
        Names `where` and what does not fit.
    """
    try:
        reader = pa.ipc.open_stream(data)
        if reader.schema != SCHEMA or (reader.schema.metadata or {}).get(b"txfm_block") != BLOCK_VERSION:
            raise ValueError(
                f"{where}: not a block of version {BLOCK_VERSION.decode()} (schema {reader.schema}); build the shards again"
            )
        table = reader.read_next_batch()
    except (pa.ArrowInvalid, OSError, StopIteration) as error:
        raise ValueError(
            f"{where}: not a readable Arrow block ({error}); the shard is damaged, build it again"
        ) from error
    if len(table) != n_samples:
        raise ValueError(f"{where}: holds {len(table)} samples, the manifest says {n_samples}; build the shards again")
    numbers = {name: table[name].to_numpy(zero_copy_only=False) for name in SCHEMA.names[:3] + SCHEMA.names[4:6]}
    nnz, panel_id, library_size = numbers["nnz"], numbers["panel_id"], numbers["library_size"]
    if len(nnz) and (nnz.min() < 0 or nnz.max() > n_genes):
        raise ValueError(f"{where}: a sample claims {nnz.max()} non-zeros of {n_genes} genes; the shard is damaged")
    if len(nnz) and (panel_id.min() < 0 or panel_id.max() >= n_panels):
        raise ValueError(f"{where}: a sample names panel {panel_id.max()} of {n_panels}; the shard is damaged")
    if not (np.isfinite(library_size) & (library_size > 0)).all():
        raise ValueError(f"{where}: a library size is not a positive number; the shard is damaged")
    indptr = np.concatenate([[0], np.cumsum(nnz, dtype=np.int64)])
    gene_ids, counts = np.empty(indptr[-1], np.uint16), np.empty(indptr[-1], np.uint32)
    bad = packing.unpack_genes(*_binary(table["genes"]), indptr, n_genes, gene_ids)
    if bad < 0:
        bad = packing.unpack_counts(*_binary(table["counts"]), indptr, counts)
    if bad >= 0:
        raise ValueError(
            f"{where}: the packed bytes of sample {bad} do not hold its {nnz[bad]} counts; the shard is damaged"
        )
    batch = table["batch"].to_numpy(zero_copy_only=False)
    return Block(
        numbers["sample_id"],
        numbers["dataset"],
        panel_id,
        batch,
        library_size,
        Ragged(indptr, gene_ids, counts),
    )


def _binary(column: pa.BinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and offsets of a binary column without copying."""
    _, offsets, data = column.buffers()
    starts = np.frombuffer(offsets, np.int32, len(column) + 1, column.offset * 4)
    values = np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
    if len(starts) and (starts[0] < 0 or (np.diff(starts) < 0).any() or starts[-1] > len(values)):
        raise ValueError("the offsets of a binary column do not fit its bytes; the shard is damaged")
    return values, starts
