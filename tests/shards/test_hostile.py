"""Corpora that somebody made or damaged: each is refused, by opening or by reading, with an error that names the file.

A forger is assumed to know the format: every size, CRC-32, sha256 and the checksum of the manifest are made to fit, so
that what refuses a corpus is the check that is meant.
"""

import io
import random
import shutil
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shards import manifest as mf
from shards.blocks import BlockReader
from shards.codec import BlockSchema, encode
from shards.manifest import SPLITS, Corpus, parse_manifest
from shards.verify import verify
from tests.shards.corpus_maker import Plan, make_block, make_corpus, reseal, write_tar

FIRST, SECOND = "train-000000.tar", "train-000001.tar"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("hostile") / "good", Plan(weights=(1.0, 0.5)))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "corpus")


def read_all(folder: Path) -> int:
    """Open a corpus and read every block; how many samples there are."""
    corpus = Corpus(folder)
    readers = [BlockReader(corpus, split) for split in SPLITS]
    return sum(len(reader.read(number)) for reader in readers for number in range(len(reader)))


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


def manifest_of(folder: Path) -> mf.Manifest:
    return parse_manifest((folder / mf.MANIFEST).read_bytes(), "here")


def payloads_of(folder: Path, name: str) -> list[bytes]:
    with tarfile.open(folder / name, "r:") as tar:
        return [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]


def forge(folder: Path, name: str, payloads: list[bytes], *, keep: bool = False) -> None:
    """Put other payloads into a shard, and say in the manifest that they belong there; with `keep`, leave its file alone."""
    if not keep:
        write_tar(folder / name, payloads)
    manifest = manifest_of(folder)
    shards = list(manifest.splits["train"])
    number = next(i for i, shard in enumerate(shards) if shard.name == name)
    entries, offset = [], 0
    for old, payload in zip(shards[number].blocks, payloads, strict=True):
        entries.append(old._replace(offset=offset, bytes=len(payload), crc32=zlib.crc32(payload)))
        offset += entries[-1].padded
    shards[number] = replace(shards[number], blocks=tuple(entries))
    reseal(folder, splits={**manifest.splits, "train": tuple(shards)})


def test_the_good_one_is_read_whole(good: Path, folder: Path) -> None:
    assert read_all(folder) == 112
    reseal(folder)
    forge(folder, FIRST, payloads_of(folder, FIRST))
    assert read_all(folder) == 112 == verify(Corpus(folder))["n_train"] + verify(Corpus(folder))["n_val"]
    assert (folder / mf.MANIFEST).read_bytes() == (good / mf.MANIFEST).read_bytes()


# Members


def header(**changes: object) -> bytes:
    """The tar header of the second block of a shard, changed and with its sum made to fit."""
    info = tarfile.TarInfo("000001.arrow")
    info.size, info.mode, info.uname, info.gname = 2288, 0o444, "txfm", "txfm"
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.USTAR_FORMAT)


MEMBERS = {
    "symbolic link": ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a symbolic link, expected a regular file"),
    "hard link": ({"type": tarfile.LNKTYPE, "linkname": "000000.arrow"}, "is a hard link"),
    "folder": ({"type": tarfile.DIRTYPE}, "is a folder"),
    "device": ({"type": tarfile.CHRTYPE}, "is a device"),
    "named pipe": ({"type": tarfile.FIFOTYPE}, "is a pipe"),
    "extended header": ({"type": tarfile.XHDTYPE}, "is an extended header"),
    "long name": ({"type": tarfile.GNUTYPE_LONGNAME}, "is a long name"),
    "sparse file": ({"type": tarfile.GNUTYPE_SPARSE}, "is a sparse file"),
    "unknown type": ({"type": b"9"}, "is of type b'9'"),
    "link name": ({"linkname": "x"}, "links to another file"),
    "absolute name": ({"name": "/000001.arrow"}, "is named '/000001.arrow', expected '000001.arrow'"),
    "name out of the folder": ({"name": "../000001.arrow"}, r"is named '\.\./000001.arrow'"),
    "name with a folder": ({"name": "a" * 90 + "/" + "b" * 90}, "is named 'aaaa"),
    "pickle": ({"name": "000001.pyd"}, "is named '000001.pyd'"),
    "another number": ({"name": "000002.arrow"}, "is named '000002.arrow', .* missing, added or in another order"),
    "another size": ({"size": 2287}, "has the size"),
    "huge size": ({"size": 8**11 - 1}, "has the size"),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMBERS)
def test_a_member_that_is_no_plain_block(folder: Path, case: str) -> None:
    changes, message = MEMBERS[case]
    entry = manifest_of(folder).splits["train"][0].blocks[1]
    data = bytearray((folder / FIRST).read_bytes())
    data[entry.offset : entry.offset + 512] = header(**{"size": entry.bytes, **changes})
    (folder / FIRST).write_bytes(bytes(data))
    reseal(folder)
    with pytest.raises(ValueError, match=f"{FIRST}: block at byte {entry.offset}: the tar member {message}"):
        BlockReader(Corpus(folder), "train").read(1)
    assert len(BlockReader(Corpus(folder), "train").read(0)) == 7
    with pytest.raises(ValueError, match=message):
        verify(Corpus(folder))


def test_the_header_of_the_maker_is_the_one_that_is_changed_above(folder: Path) -> None:
    entry = manifest_of(folder).splits["train"][0].blocks[1]
    found = (folder / FIRST).read_bytes()[entry.offset : entry.offset + 512]
    assert (
        tarfile.TarInfo.frombuf(found, "utf-8", "strict").name
        == tarfile.TarInfo.frombuf(header(), "utf-8", "strict").name
    )


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar(folder: Path, kind: str) -> None:
    path = folder / FIRST
    plain = path.read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as tar:
        info = tarfile.TarInfo("000000.arrow")
        info.size = 10**6
        tar.addfile(info, io.BytesIO(bytes(10**6)))
    path.write_bytes(buffer.getvalue().ljust(len(plain), b"\0"))
    reseal(folder)
    with pytest.raises(
        ValueError, match=f"{FIRST}: block at byte 0: the tar member is compressed; shards are plain tar files"
    ):
        read_all(folder)


def test_a_cut_shard(folder: Path, good: Path) -> None:
    data = (good / FIRST).read_bytes()
    blocks = manifest_of(folder).splits["train"][0].blocks
    for length in (0, 100, 512, blocks[2].offset, blocks[2].offset + 700, len(data) - 1):
        (folder / FIRST).write_bytes(data[:length])
        with pytest.raises(
            ValueError, match=f"{FIRST}: {length} bytes, the manifest says {len(data)}; the file is cut"
        ):
            Corpus(folder)
    (folder / FIRST).write_bytes(data)
    corpus = Corpus(folder)
    for length in (blocks[2].offset, blocks[2].offset + 700):  # cut once it is open: not one sample less, an error
        (folder / FIRST).write_bytes(data[:length])
        assert len(BlockReader(corpus, "train").read(1)) == 7
        with pytest.raises(
            ValueError, match=f"{FIRST}.*the file ends too early: .* of {blocks[2].padded} bytes from byte 6144"
        ):
            BlockReader(corpus, "train").read(2)
        with pytest.raises(ValueError, match="ends too early"):
            verify(corpus)


def test_a_tar_cut_at_a_member_and_filled_up(folder: Path) -> None:
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(
        data[: manifest_of(folder).splits["train"][0].blocks[2].offset].ljust(len(data), b"\0")
    )
    reseal(folder)
    with pytest.raises(ValueError, match=f"{FIRST}: block at byte 6144: the tar member has the magic"):
        read_all(folder)


def test_reordered_members(folder: Path) -> None:
    blocks = manifest_of(folder).splits["train"][0].blocks
    data = bytearray((folder / FIRST).read_bytes())
    one, two = (bytes(data[b.offset : b.offset + b.padded]) for b in blocks[:2])
    assert len(one) == len(two)
    data[: len(one) + len(two)] = two + one
    (folder / FIRST).write_bytes(bytes(data))
    reseal(folder)
    with pytest.raises(
        ValueError, match=f"{FIRST}: block at byte 0: .*named '000001.arrow', expected '000000.arrow'.*order"
    ):
        BlockReader(Corpus(folder), "train").read(0)


def test_payloads_in_another_order_under_the_right_names(folder: Path) -> None:
    payloads = payloads_of(folder, FIRST)
    write_tar(folder / FIRST, [payloads[1], payloads[0], *payloads[2:]])
    reseal(folder)
    with pytest.raises(ValueError, match=f"{FIRST}: block at byte 0: "):
        BlockReader(Corpus(folder), "train").read(0)


def test_members_behind_the_last_block(folder: Path) -> None:
    blocks = manifest_of(folder).splits["train"][0].blocks
    data = bytearray((folder / FIRST).read_bytes())
    end = blocks[-1].offset + blocks[-1].padded
    data[end : end + 512] = header(name="000004.arrow", size=0)
    (folder / FIRST).write_bytes(bytes(data))
    reseal(folder)
    assert read_all(folder) == 112  # it is never looked at
    with pytest.raises(ValueError, match=f"{FIRST}: bytes behind the last block, from byte {end}, are not empty"):
        verify(Corpus(folder))


# Payloads


def forged(folder: Path, change: Callable[[bytes], bytes]) -> None:
    payloads = payloads_of(folder, FIRST)
    forge(folder, FIRST, [payloads[0], change(payloads[1]), *payloads[2:]])


def declare(payload: bytes, n_bytes: int) -> bytes:
    """Let the largest zstd buffer of a block say that it will grow to so many bytes."""
    data = bytearray(payload)
    places = []
    at = data.find(b"\x28\xb5\x2f\xfd")
    while at >= 8:
        declared = struct.unpack_from("<q", data, at - 8)[0]
        if 0 < declared < 2**31:
            places.append((declared, at - 8))
        at = data.find(b"\x28\xb5\x2f\xfd", at + 1)
    struct.pack_into("<q", data, max(places)[1], n_bytes)
    return bytes(data)


@pytest.mark.parametrize("n_bytes", [2**28 + 1, 2**33, 2**62, -5, 10, 2**20])
def test_a_buffer_that_grows_to_another_size_than_it_says(folder: Path, n_bytes: int) -> None:
    forged(folder, lambda payload: declare(payload, n_bytes))
    corpus = Corpus(folder)
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(ValueError, match=f"{FIRST}: block at byte 3072: not a readable block"):
        BlockReader(corpus, "train").read(1)
    assert pa.default_memory_pool().max_memory() - before < 2**24


def bomb(schema: BlockSchema, n_bytes: int) -> bytes:
    """A block whose column of genes is of zeros that take almost no room."""
    names, n = schema.arrow.names, 7
    columns = []
    for name, kind in zip(names, schema.arrow.types, strict=True):
        if name in ("genes", "counts"):
            columns.append(pa.array([b""] * (n - 1) + [bytes(n_bytes)], kind))
        elif kind == pa.binary():
            columns.append(pa.array([b""] * n, kind))
        elif name == "batch":
            columns.append(pa.array(["b0"] * n).dictionary_encode())
        else:
            columns.append(pa.array(np.ones(n), kind) if name == "library_size" else pa.array([0] * n, kind))
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, schema.arrow, options=options) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema.arrow))
    return bytes(sink.getvalue())


def test_a_bomb_of_zeros(folder: Path) -> None:
    payload = bomb(Corpus(folder).schema, 140_000_000)
    assert len(payload) < 200_000
    forged(folder, lambda _: payload)
    corpus = Corpus(folder)
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{FIRST}: block at byte 3072: .*declares 2800.* bytes"):
        BlockReader(corpus, "train").read(1)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert pa.total_allocated_bytes() <= before + 1_000_000 and pool.bytes_allocated() <= before + 1_000_000


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty", "not a readable block"),
        ("text", "not a readable block"),
        ("pickle", "not a readable block"),
        ("cut", "not a readable"),
    ],
)
def test_a_payload_that_is_no_block(folder: Path, case: str, message: str) -> None:
    # The bytes of a pickle that would run a command, if anything would unpickle it
    payloads = {"empty": b"\0", "text": b"hello" * 100, "pickle": b"cos\nsystem\n(S'touch ran'\ntR."}
    forged(folder, lambda payload: payloads.get(case, payload[: len(payload) // 2]))
    with pytest.raises(ValueError, match=f"{FIRST}: block at byte 3072: {message}"):
        BlockReader(Corpus(folder), "train").read(1)
    assert not Path("ran").exists()


def other_block(schema: BlockSchema, *, dataset: int = 0, n: int = 7) -> bytes:
    return encode(make_block(np.arange(n), np.full(n, dataset), np.zeros(n, int)), schema)


def test_what_a_block_says_must_exist(folder: Path) -> None:
    schema = Corpus(folder).schema
    cases = (
        (other_block(replace(schema, n_panels=9, n_datasets=9), dataset=5), "names (panel|dataset) 5 of 2"),
        (other_block(schema, n=6), "holds 6 samples, the manifest says 7"),
        (other_block(replace(schema, vocabulary_sha256="f" * 64)), "vocabulary ffffffffffffffff"),
        (other_block(replace(schema, has_fractions=True)), "expected the columns"),
    )
    for payload, message in cases:
        forged(folder, lambda _, payload=payload: payload)
        with pytest.raises(ValueError, match=f"{FIRST}: block at byte 3072: .*{message}"):
            BlockReader(Corpus(folder), "train").read(1)


def test_gene_ids_beyond_the_vocabulary(folder: Path) -> None:
    schema = Corpus(folder).schema
    block = make_block(np.arange(1, 8), np.zeros(7, int), np.zeros(7, int))
    at = int(block.packed.indptr[1]) - 1  # the last gene of the first sample, moved up by 250
    genes = block.packed.genes.copy()
    genes[at] = 250
    forged(folder, lambda _: encode(replace(block, packed=replace(block.packed, genes=genes)), schema))
    with pytest.raises(ValueError, match=f"{FIRST}: block at byte 3072: .*400"):
        BlockReader(Corpus(folder), "train").read(1)


def test_offsets_that_fall(folder: Path) -> None:
    """Without compression, where the samples begin can be found in the bytes and changed."""
    schema = Corpus(folder).schema
    block = make_block(np.arange(1, 8), np.zeros(7, int), np.zeros(7, int))
    plain = pa.BufferOutputStream()
    with pa.ipc.new_stream(plain, schema.arrow) as writer:
        writer.write_table(pa.ipc.open_stream(encode(block, schema)).read_all())
    data = bytearray(plain.getvalue())
    starts = block.packed.indptr.astype(np.int32)
    at = data.find(starts.tobytes())
    assert at > 0 and starts[2] < starts[3]
    forged(folder, lambda _: bytes(data))
    assert len(BlockReader(Corpus(folder), "train").read(1)) == 7
    struct.pack_into("<ii", data, at + 4 * 2, int(starts[3]), int(starts[2]))
    forged(folder, lambda _: bytes(data))
    with pytest.raises(ValueError, match=f"{FIRST}: block at byte 3072: not a readable block"):
        BlockReader(Corpus(folder), "train").read(1)


# Flips


def test_any_flipped_bit_is_caught_by_opening_and_reading(good: Path, folder: Path) -> None:
    rng = random.Random(7)
    names = sorted(path.name for path in good.iterdir())
    assert names == [
        "manifest.json", "panels.arrow", "train-000000.tar", "train-000001.tar", "train-000002.tar", "train-samples.arrow",
        "val-000000.tar", "vocabulary.parquet",
    ]  # fmt: skip
    shards = {shard.name: shard for split in manifest_of(good).splits.values() for shard in split}
    for name in names:
        size = (good / name).stat().st_size
        if name in shards:  # behind the blocks lies nothing that is read; `verify` looks there
            size = shards[name].blocks[-1].offset + shards[name].blocks[-1].padded
        for _ in range(12):
            place, bit = rng.randrange(size), rng.randrange(8)
            flip(folder / name, place, bit)
            with pytest.raises(ValueError, match=name) as caught:
                read_all(folder)
            assert str(folder) in str(caught.value)
            flip(folder / name, place, bit)
    assert read_all(folder) == 112


def test_every_bit_of_a_header_counts(folder: Path) -> None:
    corpus = Corpus(folder)
    reader = BlockReader(corpus, "train")
    path = folder / FIRST
    data = path.read_bytes()
    for place in range(512):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(bytes(changed))
        with pytest.raises(ValueError, match=f"{FIRST}: block at byte 0: the tar member"):
            reader.read(0)
    path.write_bytes(data)
    for place in (147, 148, 153, 154, 155):  # around the sum of the header itself, every bit
        for bit in range(8):
            flip(path, place, bit)
            with pytest.raises(ValueError, match=f"{FIRST}: block at byte 0: the tar member"):
                reader.read(0)
            flip(path, place, bit)


def test_verify_finds_flips_behind_the_blocks(folder: Path) -> None:
    size = (folder / "val-000000.tar").stat().st_size
    flip(folder / "val-000000.tar", size - 1, 3)
    assert read_all(folder) == 112
    with pytest.raises(ValueError, match="val-000000.tar: bytes behind the last block"):
        verify(Corpus(folder))


# Mixed corpora


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("hostile") / "other", Plan(weights=(1.0, 0.5), seed=1))


def test_a_shard_of_another_corpus(folder: Path, other: Path) -> None:
    shutil.copy(other / SECOND, folder / SECOND)
    assert (other / SECOND).stat().st_size == 20480
    with pytest.raises(ValueError, match=f"{SECOND}: block at byte 0: .*of another corpus"):
        read_all(folder)


def test_the_manifest_of_another_corpus(folder: Path, other: Path) -> None:
    shutil.copy(other / mf.MANIFEST, folder / mf.MANIFEST)
    with pytest.raises(
        ValueError, match=r"(train-samples\.arrow|vocabulary\.parquet|panels\.arrow|\.tar): .*another corpus"
    ):
        read_all(folder)
