"""How many bytes an Arrow IPC message says that it will take once decompressed, read before anything is decompressed.

Arrow allocates what a compressed buffer declares, so a hostile block of some bytes could ask for gigabytes. Its API
shows the declared sizes nowhere; they stand in front of each buffer, whose places are in the message's FlatBuffer
(format/Message.fbs of Apache Arrow: tables Message, RecordBatch, DictionaryBatch, BodyCompression).
"""

import struct

import pyarrow as pa

_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER = 1, 2
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_DICTIONARY_DATA = 1
_BATCH_BUFFERS, _BATCH_COMPRESSION = 2, 3
_ZSTD = 1


class _Table:
    """One table of a FlatBuffer: fields are found through its vtable."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self._at = data, at
        self._vtable = at - _read("<i", data, at)
        self._vtable_bytes = _read("<H", data, self._vtable)

    def field(self, number: int) -> int | None:
        """Place of a field, None where it has its default."""
        entry = 4 + 2 * number
        offset = _read("<H", self._data, self._vtable + entry) if entry + 2 <= self._vtable_bytes else 0
        return self._at + offset if offset else None

    def byte(self, number: int) -> int:
        """A field of one byte, 0 by default."""
        at = self.field(number)
        return 0 if at is None else _read("<B", self._data, at)

    def table(self, number: int) -> "_Table | None":
        """A field that is a table."""
        at = self.field(number)
        return None if at is None else _Table(self._data, at + _read("<I", self._data, at))

    def pairs(self, number: int) -> list[tuple[int, int]]:
        """A field that is a vector of structs of two int64."""
        at = self.field(number)
        if at is None:
            return []
        start = at + _read("<I", self._data, at)
        n = _read("<I", self._data, start)
        if n * 16 > len(self._data):
            raise struct.error("a vector is longer than its message")
        return [struct.unpack_from("<qq", self._data, start + 4 + 16 * i) for i in range(n)]


def _read(form: str, data: memoryview, at: int) -> int:
    if at < 0:
        raise struct.error("an offset is negative")
    value: int = struct.unpack_from(form, data, at)[0]
    return value


def decoded_bytes(message: pa.ipc.Message) -> int:
    """Bytes that the buffers of a message take once decompressed, as it declares them; 0 for a schema.

    Raises
    ------
    ValueError
        If the message is damaged, or compressed with anything but zstd.
    """
    metadata, body = memoryview(message.metadata), memoryview(message.body or b"")
    try:
        root = _Table(metadata, _read("<I", metadata, 0))
        kind, header = root.byte(_MESSAGE_HEADER_TYPE), root.table(_MESSAGE_HEADER)
        if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH) or header is None:
            return 0
        batch = header.table(_DICTIONARY_DATA) if kind == _DICTIONARY_BATCH else header
        if batch is None:
            raise struct.error("a dictionary without its values")
        compression = batch.table(_BATCH_COMPRESSION)
        if compression is None:
            return len(body)
        if compression.byte(0) != _ZSTD:
            raise ValueError("its buffers are not compressed with zstd")
        total = 0
        for offset, length in batch.pairs(_BATCH_BUFFERS):
            if length == 0:
                continue
            declared: int = struct.unpack_from("<q", body, offset)[0] if offset >= 0 and length >= 8 else -2
            if declared < -1:
                raise struct.error("a buffer has no sound size")
            total += length - 8 if declared == -1 else declared
    except struct.error as error:
        raise ValueError(f"its Arrow message is damaged ({error})") from error
    return total
