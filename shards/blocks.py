"""Blocks of a shard corpus by number, each checked on its way from the tar to the samples."""

import zlib

from shards.codec import Block, BlockSchema, decode
from shards.entries import TAR_BLOCK, BlockEntry
from shards.manifest import Corpus

_REMEDY = "copy the shard again or build it anew"
_MAGIC = slice(257, 265), b"ustar\x0000"
_CHECKSUM = slice(148, 156)
_LINK, _PREFIX = slice(157, 257), slice(345, 500)
_TYPES = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe",
    b"x": "an extended header", b"g": "an extended header", b"L": "a long name", b"K": "a long link", b"S": "a sparse file",
}  # fmt: skip


def member_name(number: int) -> str:
    """Name of the tar member that is block `number` of its shard."""
    return f"{number:06d}.arrow"


class BlockReader:
    """Reads blocks of one split by number, from several threads at once if need be."""

    def __init__(self, corpus: Corpus, split: str) -> None:
        self._files, self._schema = corpus.files, corpus.schema
        self._blocks = [
            (shard.name, number, entry) for shard in corpus.shards(split) for number, entry in enumerate(shard.blocks)
        ]

    def __len__(self) -> int:
        return len(self._blocks)

    def read(self, number: int) -> Block:
        """One block, its tar header, CRC-32 and every size checked.

        Raises
        ------
        FileNotFoundError, OSError
            If the shard cannot be reached.
        ValueError
            Names the shard and the block that is not as the manifest says.
        """
        name, position, entry = self._blocks[number]
        where = f"{self._files.where(name)}: block at byte {entry.offset}"
        place = name, entry.offset, entry.padded
        try:
            return open_member(self._files.read(*place), position, entry, where, self._schema)
        except ValueError:
            # The copy of this machine may be damaged, or of what lay there before
            if not self._files.forget(*place):
                raise
            return open_member(self._files.read(*place), position, entry, where, self._schema)


def open_member(member: bytes, position: int, entry: BlockEntry, where: str, schema: BlockSchema) -> Block:
    """The block in a slice of a shard.

    member : tar header, payload and padding.  position : of the block in its shard.

    Raises
    ------
    ValueError
        Names `where` and what is not as it must be.
    """
    check_header(member[:TAR_BLOCK], member_name(position), entry.bytes, where)
    if any(member[TAR_BLOCK + entry.bytes :]):
        raise ValueError(f"{where}: the padding behind its payload is not empty; the shard is damaged, {_REMEDY}")
    # The header says all that a tar library would find, and that copies the payload three times, at 2 to 4 us a sample.
    data = memoryview(member)[TAR_BLOCK : TAR_BLOCK + entry.bytes]
    found = zlib.crc32(data)
    if found != entry.crc32:
        raise ValueError(
            f"{where}: its CRC-32 is {found}, the manifest says {entry.crc32}; the shard is damaged or of another corpus, {_REMEDY}"
        )
    return decode(data, schema, n_samples=entry.samples, where=where)


def check_header(header: bytes, name: str, size: int, where: str) -> None:
    """Refuse a tar header that is not of a plain file of this name and size.

    Read here rather than by a tar library: those follow long names, links, sparse maps and compression, none of which is
    legal in a shard.

    Raises
    ------
    ValueError
        Says what was found.
    """
    wrong = ""
    total = 8 * ord(" ") + sum(header) - sum(header[_CHECKSUM])
    kind = header[156:157]
    if header[:2] == b"\x1f\x8b" or header[:3] == b"BZh" or header[:4] in (b"\xfd7zX", b"\x28\xb5\x2f\xfd"):
        wrong = "is compressed; shards are plain tar files"
    elif header[_MAGIC[0]] != _MAGIC[1]:
        wrong = f"has the magic {header[_MAGIC[0]]!r}, expected {_MAGIC[1]!r} of a ustar header"
    elif header[_CHECKSUM] != b"%06o\0 " % total:
        wrong = f"has the checksum {header[_CHECKSUM]!r}, its bytes add up to {total:06o} (octal)"
    elif kind != b"0":
        wrong = f"is {_TYPES.get(kind, f'of type {kind!r}')}, expected a regular file"
    elif header[:100] != name.encode().ljust(100, b"\0") or any(header[_PREFIX]):
        found = (header[_PREFIX].rstrip(b"\0") + b"/" if any(header[_PREFIX]) else b"") + header[:100].rstrip(b"\0")
        wrong = f"is named {found.decode('utf-8', 'replace')!r}, expected {name!r}: blocks are missing, added or in another order"
    elif any(header[_LINK]):
        wrong = "links to another file"
    elif header[124:136] != b"%011o\0" % size:
        wrong = f"has the size {header[124:136]!r}, expected {size:011o} (octal)"
    if wrong:
        raise ValueError(f"{where}: the tar member {wrong}; the shard is damaged or of another corpus, {_REMEDY}")
