"""One block of about a thousand samples as bytes and back: an Arrow IPC stream of one record batch, zstd inside.

The format is docs/format_shards.md; its version stands in the schema's metadata.
"""

from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import pyarrow as pa

from shards import packing
from shards.ipc_sizes import decoded_bytes
from shards.packing import Packed
from txfm_data.ragged import Ragged

BLOCK_VERSION = b"2"
MAX_BLOCK_BYTES = 256 * 1024**2
"""Largest payload that is read."""
MAX_DECODED_BYTES = 256 * 1024**2
"""Largest block once decompressed."""
MAX_BLOCK_SAMPLES = 65_536
OBS_TYPES = {
    "string": pa.dictionary(pa.int32(), pa.string()), "bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(),
}  # fmt: skip
"""Types of columns of obs that blocks may carry, and what each is in Arrow."""

# Level 1: Huffman codes do all the work on these bytes. Level 5 makes blocks larger, and slower to read (tests/bench).
_ZSTD_LEVEL = 1
_NUMBERS = (
    ("sample_id", pa.int64()), ("dataset", pa.int32()), ("panel_id", pa.int32()), ("library_size", pa.float64()),
)  # fmt: skip
_BYTES = ("genes", "gene_escapes", "counts", "count_escapes")
_WIDTHS: dict[str, type[np.generic]] = {
    "genes": np.uint8,
    "counts": np.uint8,
    "gene_escapes": np.uint16,
    "count_escapes": np.uint32,
    "fractions": np.float64,
}


@dataclass(frozen=True)
class BlockSchema:
    """What a corpus promises of each of its blocks.

    n_genes, n_panels, n_datasets : ids are below these.  vocabulary_sha256 : fingerprint of the vocabulary.
    has_fractions : whether samples may hold values that are not whole.
    obs_columns : name and type, of `OBS_TYPES`, of the columns of obs besides ``batch``.
    """

    n_genes: int
    n_panels: int
    n_datasets: int
    vocabulary_sha256: str
    has_fractions: bool = False
    obs_columns: dict[str, str] = field(default_factory=dict)

    @cached_property
    def arrow(self) -> pa.Schema:
        """Schema of the record batch of a block."""
        names = [*_BYTES, "fractions"] if self.has_fractions else list(_BYTES)
        obs = [("batch", OBS_TYPES["string"]), *((name, OBS_TYPES[kind]) for name, kind in self.obs_columns.items())]
        columns = [*_NUMBERS, *((name, pa.binary()) for name in names), *obs]
        return pa.schema(columns, metadata={"txfm_block": BLOCK_VERSION, "vocabulary": self.vocabulary_sha256[:16]})


@dataclass(frozen=True)
class Block:
    """Samples of one block.

    sample_id : (n,) int64, row of the store.  dataset, panel_id : (n,) int32, of the manifest.
    library_size : (n,) float64, counts.  packed : their counts over the vocabulary of the corpus.
    obs : n rows; ``batch`` (dictionary of string) and the columns that were asked for.
    """

    sample_id: np.ndarray
    dataset: np.ndarray
    panel_id: np.ndarray
    library_size: np.ndarray
    packed: Packed
    obs: pa.RecordBatch

    def __len__(self) -> int:
        return len(self.sample_id)

    def samples(self) -> Ragged:
        """All samples unpacked."""
        return packing.unpack(self.packed)


def encode(block: Block, schema: BlockSchema) -> bytes:
    """Bytes of a block; the same block always gives the same bytes.

    Raises
    ------
    ValueError
        If samples hold fractions that the schema does not allow, or obs lacks a column.
    """
    if len(block.packed.fractions) and not schema.has_fractions:
        raise ValueError("a block holds values that are not whole, and its corpus does not say so")
    columns = [pa.array(getattr(block, name), kind) for name, kind in _NUMBERS]
    for name in schema.arrow.names[len(_NUMBERS) :]:
        columns.append(
            _binary(block.packed, name) if name in _WIDTHS else _label(block.obs, name, schema.arrow.field(name).type)
        )
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=_ZSTD_LEVEL), use_threads=False)
    with pa.ipc.new_stream(sink, schema.arrow, options=options) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema.arrow))
    return bytes(sink.getvalue())


def _binary(packed: Packed, name: str) -> pa.BinaryArray:
    values: np.ndarray = getattr(packed, name)
    index = "indptr" if name in ("genes", "counts") else f"{name[:-1]}_indptr"
    offsets: np.ndarray = getattr(packed, index)
    bounds = (offsets * values.itemsize).astype(np.int32)
    buffers = [None, pa.py_buffer(bounds), pa.py_buffer(np.ascontiguousarray(values))]
    return pa.BinaryArray.from_buffers(pa.binary(), len(packed), buffers)


def _label(obs: pa.RecordBatch, name: str, kind: pa.DataType) -> pa.Array:
    if name not in obs.schema.names:
        raise ValueError(f"obs of the block has no column {name!r}, only {obs.schema.names}")
    values = obs.column(name)
    if pa.types.is_dictionary(kind):  # encoded anew, so that labels stand in order of appearance
        plain = values.cast(pa.string()) if pa.types.is_dictionary(values.type) else values
        return plain.cast(pa.string()).dictionary_encode().cast(kind)
    return values.cast(kind)


def decode(data: bytes | memoryview, schema: BlockSchema, *, n_samples: int, where: str) -> Block:
    """Inverse of `encode`, with every size checked before it is believed.

    n_samples : that the manifest promises.

    Raises
    ------
    ValueError
        Names `where` and what does not fit.
    """
    if len(data) > MAX_BLOCK_BYTES or n_samples > MAX_BLOCK_SAMPLES:
        raise ValueError(
            f"{where}: a block of {len(data)} bytes and {n_samples} samples; at most {MAX_BLOCK_BYTES} and {MAX_BLOCK_SAMPLES} are "
            "read, so this is no block of txfm"
        )
    table = _record_batch(data, schema, where)
    if len(table) != n_samples:
        raise ValueError(f"{where}: holds {len(table)} samples, the manifest says {n_samples}; build the shards again")
    for name, _ in _NUMBERS:
        if table[name].null_count:
            raise ValueError(f"{where}: column {name} has missing values; the shard is damaged")
    sample_id, dataset, panel_id, library_size = (table[name].to_numpy(zero_copy_only=True) for name, _ in _NUMBERS)
    for name, values, n in (("panel", panel_id, schema.n_panels), ("dataset", dataset, schema.n_datasets)):
        if n_samples and (values.min() < 0 or values.max() >= n):
            wrong = values.min() if values.min() < 0 else values.max()
            raise ValueError(f"{where}: a sample names {name} {wrong} of {n}; the shard is damaged")
    if n_samples and sample_id.min() < 0:
        raise ValueError(f"{where}: a sample has the id {sample_id.min()}; the shard is damaged")
    if not (np.isfinite(library_size) & (library_size > 0)).all():
        raise ValueError(f"{where}: a library size is not a positive number; the shard is damaged")
    packed = _packed(table, schema, where)
    packing.check(packed, schema.n_genes, where)
    first = len(schema.arrow) - 1 - len(schema.obs_columns)
    obs = table.select(list(range(first, len(schema.arrow))))
    return Block(sample_id, dataset, panel_id, library_size, packed, obs)


def _record_batch(data: bytes | memoryview, schema: BlockSchema, where: str) -> pa.RecordBatch:
    """The one record batch of a block, its declared sizes checked before anything is decompressed."""
    source = pa.py_buffer(data)
    try:
        messages = pa.ipc.MessageReader.open_stream(source)
        declared, most = 0, 2 + sum(pa.types.is_dictionary(kind) for kind in schema.arrow.types)
        for number, message in enumerate(messages):
            declared += decoded_bytes(message)
            if declared > MAX_DECODED_BYTES or number >= most:
                raise ValueError(
                    f"declares {declared} bytes in {number + 1} messages; a block has at most {MAX_DECODED_BYTES} in {most}"
                )
        options = pa.ipc.IpcReadOptions(use_threads=False)
        reader = pa.ipc.open_stream(source, options=options, memory_pool=_memory_pool())
        if reader.schema != schema.arrow:
            raise ValueError(f"expected the columns {schema.arrow.names}, found {reader.schema.names}")
        _check_metadata(reader.schema.metadata or {}, schema)
        table = reader.read_next_batch()
        table.validate(full=True)
    except (pa.ArrowException, OSError, StopIteration, ValueError) as error:
        raise ValueError(
            f"{where}: not a readable block ({' '.join(str(error).split()) or 'no samples'}); the shard is damaged or of another "
            "corpus, copy it or build it again"
        ) from error
    return table


@cache
def _memory_pool() -> pa.MemoryPool:
    """Where blocks are decompressed to: of Arrow's allocators jemalloc keeps the least of what blocks have given back."""
    return pa.default_memory_pool()


def _check_metadata(found: dict[bytes, bytes], schema: BlockSchema) -> None:
    version, vocabulary = found.get(b"txfm_block"), found.get(b"vocabulary", b"").decode("ascii", "replace")
    if version != BLOCK_VERSION:
        raise ValueError(f"format version {version!r}, this release reads {BLOCK_VERSION.decode()}")
    if vocabulary != schema.vocabulary_sha256[:16]:
        raise ValueError(f"vocabulary {vocabulary}, the manifest says {schema.vocabulary_sha256[:16]}")


def _packed(table: pa.RecordBatch, schema: BlockSchema, where: str) -> Packed:
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in [*_BYTES, "fractions"] if schema.has_fractions else _BYTES:
        columns[name] = _values(table[name], _WIDTHS[name], f"{where}: column {name}")
    indptr = columns["genes"][0]
    if not np.array_equal(indptr, columns["counts"][0]):
        raise ValueError(f"{where}: genes and counts of a sample differ in number; the shard is damaged")
    no_fractions = np.zeros(len(indptr), np.int64), np.empty(0)
    return Packed(
        indptr, columns["genes"][1], columns["gene_escapes"][1], columns["gene_escapes"][0], columns["counts"][1],
        columns["count_escapes"][1], columns["count_escapes"][0], *columns.get("fractions", no_fractions)[::-1],
    )  # fmt: skip


def _values(column: pa.BinaryArray, dtype: type[np.generic], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of each sample, in values, and the values of a binary column; the values are not copied."""
    width = np.dtype(dtype).itemsize
    _, offsets, data = column.buffers()
    bounds = (
        np.frombuffer(offsets, np.int32, len(column) + 1)
        if offsets is not None and offsets.size
        else np.zeros(1, np.int32)
    )
    n_bytes = data.size if data is not None else 0
    if column.null_count or column.offset or bounds[0] != 0 or (bounds % width).any() or bounds[-1] > n_bytes:
        raise ValueError(f"{what} does not fit its {n_bytes} bytes; the shard is damaged")
    values = np.frombuffer(data, dtype, int(bounds[-1]) // width) if bounds[-1] else np.empty(0, dtype)
    return bounds.astype(np.int64) // width, values
