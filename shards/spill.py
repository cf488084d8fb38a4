"""Spills: what pass 1 of the shuffle leaves for pass 2, samples of one range of the store sorted by their key.

A spill file has the packed values of its samples one after the other, then a record of each sample, then sums over its
train samples. Samples of a split lie in the order of the shuffle, so those of any shard are one slice of each spill. Each
part has a checksum: what a disk changed in between does not get into a shard.
"""

import json
import os
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from shards.packing import Packed
from shards.samples import DTYPES, Column

WORD = 8
"""Values of a sample are padded to whole words, which are copied and checked faster than bytes."""


@dataclass(frozen=True)
class Field:
    """One label that a record carries: a column of obs, and whether some of its integers are missing."""

    name: str
    kind: str
    has_missing: bool = False

    @classmethod
    def of(cls, column: Column) -> "Field":
        """The field that holds a column."""
        return cls(column.name, column.kind, column.is_missing is not None)


def record_type(fields: Sequence[Field]) -> np.dtype[Any]:
    """Record of one sample. key : of the shuffle.  check : of its words.  label N, missing N : of the fields."""
    items: list[tuple[str, Any]] = [
        ("key", np.uint64), ("sample_id", np.int64), ("library_size", np.float64), ("check", np.uint64), ("nnz", np.uint32),
        ("gene_escapes", np.uint32), ("count_escapes", np.uint32), ("fractions", np.uint32), ("dataset", np.int32),
    ]  # fmt: skip
    for at, field in enumerate(fields):
        items.append((f"label{at}", DTYPES[field.kind]))
        if field.has_missing:
            items.append((f"missing{at}", np.bool_))
    return np.dtype(items)


def n_words(records: np.ndarray) -> np.ndarray:
    """Words that the values of each sample take, (n,) int64."""
    n_bytes = 2 * records["nnz"].astype(np.int64) + 2 * records["gene_escapes"].astype(np.int64)
    n_bytes += 4 * records["count_escapes"].astype(np.int64) + 8 * records["fractions"].astype(np.int64)
    return -(-n_bytes // WORD)


def set_lengths(records: np.ndarray, packed: Packed) -> None:
    """Write what the packed samples hold into their records."""
    records["nnz"] = np.diff(packed.indptr)
    records["gene_escapes"] = np.diff(packed.gene_escape_indptr)
    records["count_escapes"] = np.diff(packed.count_escape_indptr)
    records["fractions"] = np.diff(packed.fraction_indptr)


@njit(nogil=True, cache=True)
def _put(part, out, at):  # type: ignore[no-untyped-def]
    n = part.shape[0]
    target = out[at : at + n]
    for i in range(n):
        target[i] = part[i]
    return at + n


@njit(nogil=True, cache=True)
def _lay(  # type: ignore[no-untyped-def]
    indptr, genes, gene_escapes, gene_escape_indptr, counts, count_escapes, count_escape_indptr, fractions, fraction_indptr,
    words, out,
):  # fmt: skip
    at = 0
    for b in range(indptr.shape[0] - 1):
        end = at + 8 * words[b]
        at = _put(genes[indptr[b] : indptr[b + 1]], out, at)
        at = _put(counts[indptr[b] : indptr[b + 1]], out, at)
        at = _put(gene_escapes[2 * gene_escape_indptr[b] : 2 * gene_escape_indptr[b + 1]], out, at)
        at = _put(count_escapes[4 * count_escape_indptr[b] : 4 * count_escape_indptr[b + 1]], out, at)
        at = _put(fractions[8 * fraction_indptr[b] : 8 * fraction_indptr[b + 1]], out, at)
        while at < end:
            out[at] = 0
            at += 1


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def lay(packed: Packed, words: np.ndarray, out: np.ndarray) -> None:
    """Write the values of packed samples, one sample after the other.

    words : (n,) int64, of `n_words`.  out : (sum of words,) uint64.
    """
    _lay(
        packed.indptr, packed.genes, _bytes(packed.gene_escapes), packed.gene_escape_indptr, packed.counts,
        _bytes(packed.count_escapes), packed.count_escape_indptr, _bytes(packed.fractions), packed.fraction_indptr, words,
        out.view(np.uint8),
    )  # fmt: skip


@njit(nogil=True, cache=True)
def arrange(source, starts, words, order, out, checks):  # type: ignore[no-untyped-def]
    """Copy samples in another order, and sum up each.

    source, out : uint64.  starts, words : (n,) int64. Where each sample begins in `source`, and its words.
    order : (n,) int64.  checks : (n,) uint64, written by position in `order`: odd multiples of the words, summed, so that
        a flipped bit or exchanged words show.
    """
    at = 0
    for r in range(order.shape[0]):
        start = starts[order[r]]
        n = words[order[r]]
        sample, target = source[start : start + n], out[at : at + n]
        check = np.uint64(n)
        for i in range(n):
            target[i] = sample[i]
            check += sample[i] * np.uint64(2 * i + 1)
        checks[r] = check
        at += n


@njit(nogil=True, cache=True)
def first_damaged(source, starts, words, checks):  # type: ignore[no-untyped-def]
    """First sample whose words do not sum up to its check, or -1."""
    for b in range(starts.shape[0]):
        sample = source[starts[b] : starts[b] + words[b]]
        check = np.uint64(words[b])
        for i in range(sample.shape[0]):
            check += sample[i] * np.uint64(2 * i + 1)
        if check != checks[b]:
            return b
    return -1


@njit(nogil=True, cache=True)
def _lift(  # type: ignore[no-untyped-def]
    source, starts, indptr, genes, gene_escapes, gene_escape_indptr, counts, count_escapes, count_escape_indptr, fractions,
    fraction_indptr,
):  # fmt: skip
    for b in range(starts.shape[0]):
        at = 8 * starts[b]
        low, high = indptr[b], indptr[b + 1]
        _put(source[at : at + high - low], genes, low)
        at += high - low
        _put(source[at : at + high - low], counts, low)
        at += high - low
        low, high = 2 * gene_escape_indptr[b], 2 * gene_escape_indptr[b + 1]
        _put(source[at : at + high - low], gene_escapes, low)
        at += high - low
        low, high = 4 * count_escape_indptr[b], 4 * count_escape_indptr[b + 1]
        _put(source[at : at + high - low], count_escapes, low)
        at += high - low
        low, high = 8 * fraction_indptr[b], 8 * fraction_indptr[b + 1]
        _put(source[at : at + high - low], fractions, low)


def lift(source: np.ndarray, starts: np.ndarray, records: np.ndarray) -> Packed:
    """Packed samples from their words, in the order of `records`.

    source : uint64, as `lay` writes it.  starts : (n,) int64, first word of each sample.  records : of the same samples.
    """
    index = []
    for name in ("nnz", "gene_escapes", "count_escapes", "fractions"):
        indptr = np.zeros(len(records) + 1, np.int64)
        np.cumsum(records[name], out=indptr[1:])
        index.append(indptr)
    packed = Packed(
        index[0], np.empty(index[0][-1], np.uint8), np.empty(index[1][-1], np.uint16), index[1],
        np.empty(index[0][-1], np.uint8), np.empty(index[2][-1], np.uint32), index[2],
        np.empty(index[3][-1], np.float64), index[3],
    )  # fmt: skip
    _lift(
        source.view(np.uint8), starts, packed.indptr, packed.genes, packed.gene_escapes.view(np.uint8), packed.gene_escape_indptr,
        packed.counts, packed.count_escapes.view(np.uint8), packed.count_escape_indptr, packed.fractions.view(np.uint8),
        packed.fraction_indptr,
    )  # fmt: skip
    return packed


@dataclass(frozen=True, eq=False)
class Spill:
    """What is in a spill file, as the JSON beside it says.

    n_words : of the values of all samples.  n_samples : per split.
    rows, words : per split, (n_shards + 1,) uint32, first record and first word of the file that each shard has.
    crc : per split, (n_shards,) uint32, CRC-32 of these records.  sums_crc : of the sums.
    nnz : values of all samples.  n_genes : of the panel, over which the sums go.
    """

    n_bytes: int
    n_words: int
    n_samples: tuple[int, int]
    rows: tuple[np.ndarray, np.ndarray]
    words: tuple[np.ndarray, np.ndarray]
    crc: tuple[np.ndarray, np.ndarray]
    sums_crc: int
    nnz: int
    n_genes: int
    has_fractions: bool


_INDEX = ("rows", "words", "crc")


def spill_path(folder: Path, number: int) -> Path:
    """File of one task of pass 1."""
    return folder / f"{number:06d}.spill"


def write_spill(
    path: Path,
    values: np.ndarray,
    records: np.ndarray,
    sums: np.ndarray,
    n_train: int,
    cuts: tuple[np.ndarray, np.ndarray],
) -> None:
    """Write a spill, and what it is beside it once it is on disk.

    values : uint64, samples in the order of `records`.  records : train samples by key, then val samples by key.
    sums : (3, P) float64: of the train samples per gene of the panel, number above zero, sum of normalised counts and of their
        logarithms.
    cuts : per split, key at which each shard begins.
    """
    ends = np.concatenate([[0], np.cumsum(n_words(records))])
    index: dict[str, list[list[int]]] = {name: [] for name in _INDEX}
    for first, keys, cut in (
        (0, records["key"][:n_train], cuts[0]), (n_train, records["key"][n_train:], cuts[1]),
    ):  # fmt: skip
        bounds = [first + int(at) for at in np.searchsorted(keys, cut)] + [first + len(keys)]
        index["rows"].append(bounds)
        index["words"].append(ends[bounds].tolist())
        pairs = zip(bounds[:-1], bounds[1:], strict=True)
        index["crc"].append([zlib.crc32(records[low:high].tobytes()) for low, high in pairs])
    part = part_of(path)
    with open(part, "wb", buffering=0) as handle:
        for array in (values, records, sums):
            view = memoryview(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
            while len(view):
                view = view[handle.write(view) :]
        os.fsync(handle.fileno())
        n_bytes = handle.tell()
    os.replace(part, path)
    tree = {
        "n_bytes": n_bytes, "n_words": int(ends[-1]), "n_samples": [n_train, len(records) - n_train], **index,
        "sums_crc": zlib.crc32(sums.tobytes()), "nnz": int(records["nnz"].astype(np.int64).sum()), "n_genes": sums.shape[1],
        "has_fractions": bool(records["fractions"].any()),
    }  # fmt: skip
    write_json(path.with_suffix(".json"), tree)


def part_of(path: Path) -> Path:
    """Name of a file while it is written, each time another: a worker that outlives a killed build may write it as well."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a small file that is there whole or not at all."""
    part = part_of(path)
    with open(part, "w", encoding="utf-8") as handle:
        json.dump(tree, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is no such file, or none that it wrote."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def finished_spill(path: Path) -> Spill | None:
    """The spill at `path` if it is there in its full length."""
    tree = read_json(path.with_suffix(".json"))
    if tree is None or not path.is_file():
        return None
    try:
        index = {name: tuple(np.array(part, np.uint32) for part in tree[name]) for name in _INDEX}
        spill = Spill(**{**tree, **index, "n_samples": tuple(tree["n_samples"])})
    except (KeyError, TypeError, ValueError, OverflowError):  # of another release
        return None
    return spill if path.stat().st_size == spill.n_bytes else None


def read_sums(path: Path, spill: Spill, record_bytes: int) -> np.ndarray:
    """Sums over the train samples of a spill, (3, P) float64.

    Raises
    ------
    ValueError
        If they are not what was written.
    """
    with open(path, "rb") as handle:
        handle.seek(spill.n_words * WORD + sum(spill.n_samples) * record_bytes)
        data = handle.read(3 * 8 * spill.n_genes)
    if zlib.crc32(data) != spill.sums_crc or len(data) != 24 * spill.n_genes:
        raise damaged(path)
    return np.frombuffer(data, np.float64).reshape(3, spill.n_genes)


def damaged(path: Path) -> ValueError:
    """Error for a spill that is not as it was written."""
    return ValueError(
        f"{path}: is not what pass 1 wrote there; the disk lost or changed it: check the disk, and run the command again"
    )
