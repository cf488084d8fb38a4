"""Retries: what is tried again, what is told at once, and how; over real reads of a real array."""

import errno
import logging

import numpy as np
import pyarrow as pa
import pytest
import requests
import tiledbsoma

from txfm_data.retry import is_transient, redact, with_retries

REMEDY = "run it again"
SLOW_DOWN = (
    "[TileDB::S3] Error: S3: Failed to get object s3://b/x [Error Type: 100] [HTTP Response Code: 503] "
    "[Exception: SlowDown] : Please reduce your request rate."
)
CURL = "S3: Error while listing [Error Type: 99] [HTTP Response Code: -1] : curlCode: 28, Timeout was reached"


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("array") / "x.soma")
    tiledbsoma.SparseNDArray.create(uri, type=pa.int64(), shape=(10, 10)).close()
    with tiledbsoma.open(uri, "w") as writer:
        writer.write(pa.table({"soma_dim_0": [0, 5], "soma_dim_1": [1, 2], "soma_data": [3, 4]}))
    # Faults keep their frames, and so what was read: with buffers of 1 GiB each the tests after these could not fork
    small = tiledbsoma.SOMATileDBContext(tiledb_config={"soma.init_buffer_bytes": 1024**2})
    with tiledbsoma.open(uri, context=small) as reader:
        yield reader


class Faulty:
    """A real read that first raises the faults it was given."""

    def __init__(self, array, *faults):
        self.array, self.faults, self.calls = array, list(faults), 0

    def __call__(self):
        self.calls += 1
        if self.faults:
            raise self.faults.pop(0)
        return self.array.read((slice(0, 9),)).tables().concat()


def http_error(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} for url: https://x", response=response)


TRANSIENT = [
    ConnectionResetError("connection reset by peer"),
    TimeoutError("timed out"),
    OSError(errno.ECONNREFUSED, "refused"),
    OSError(errno.EIO, "input/output error"),
    requests.ConnectionError("Max retries exceeded"),
    requests.Timeout("read timed out"),
    http_error(503),
    http_error(429),
    tiledbsoma.SOMAError(SLOW_DOWN),
    tiledbsoma.SOMAError(CURL),
    tiledbsoma.SOMAError("[HTTP Response Code: 500] [Exception: InternalError]"),
    tiledbsoma.SOMAError("curlCode: 6, Could not resolve hostname"),
    tiledbsoma.SOMAError("Connection was reset"),
    RuntimeError("S3: HTTP response code: 502, Bad Gateway"),
]
PERMANENT = [
    (FileNotFoundError(2, "No such file"), FileNotFoundError),
    (PermissionError(13, "Permission denied"), PermissionError),
    (OSError(errno.ENOSPC, "No space left on device"), OSError),
    (http_error(404), OSError),
    (ValueError("not a number"), ValueError),
    (requests.exceptions.InvalidURL("bad url"), ValueError),
    (tiledbsoma.DoesNotExistError("Group does not exist"), FileNotFoundError),
    (tiledbsoma.SOMAError("[HTTP Response Code: 404] NoSuchKey"), FileNotFoundError),
    (tiledbsoma.SOMAError("[HTTP Response Code: 403] AccessDenied"), PermissionError),
    (tiledbsoma.SOMAError("Checksum mismatch for md5 filter; timeout"), ValueError),
    (tiledbsoma.SOMAError("Column x does not exist in schema"), ValueError),
    (tiledbsoma.SOMAError("Could not parse the given QueryCondition statement"), ValueError),
    (RuntimeError("Corrupted chunk"), ValueError),
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=lambda fault: str(fault)[:40])
def test_transient_faults_are_tried_again(array, fault, caplog):
    waits = []
    work = Faulty(array, fault, fault)
    assert is_transient(fault)
    with caplog.at_level(logging.WARNING):
        table = with_retries(work, what="dataset d, rows 0 to 9", remedy=REMEDY, sleep=waits.append)
    np.testing.assert_array_equal(table["soma_data"], [3, 4])
    assert work.calls == 3
    assert 0.5 <= waits[0] <= 1.0 and 1.0 <= waits[1] <= 2.0
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "dataset d, rows 0 to 9: try 1 of 5 failed" in caplog.records[0].getMessage()


@pytest.mark.parametrize(("fault", "kind"), PERMANENT, ids=lambda value: str(value)[:40])
def test_permanent_faults_are_told_at_once(array, fault, kind):
    work = Faulty(array, fault)
    assert not is_transient(fault)
    with pytest.raises(kind, match="^dataset d, rows 0 to 9: .*; run it again$") as error:
        with_retries(work, what="dataset d, rows 0 to 9", remedy=REMEDY, sleep=pytest.fail)
    assert work.calls == 1 and error.value.__cause__ is fault


def test_a_real_missing_array_is_told_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^the block: not there: .*; run it again$"):
        with_retries(lambda: tiledbsoma.open(str(tmp_path / "no")), what="the block", remedy=REMEDY, sleep=pytest.fail)


def test_the_last_try_names_the_block_the_cause_and_the_remedy(array):
    waits = []
    fault = tiledbsoma.SOMAError(CURL)
    work = Faulty(array, *[fault] * 9)
    with pytest.raises(
        OSError, match=r"^rows 0 to 9: failed 4 times, last with: .*curlCode: 28.*; run it again$"
    ) as error:
        with_retries(work, what="rows 0 to 9", remedy=REMEDY, tries=4, sleep=waits.append)
    assert work.calls == 4 and len(waits) == 3 and error.value.__cause__ is fault
    again = []
    with pytest.raises(OSError, match="failed 4 times"):
        with_retries(Faulty(array, *[fault] * 9), what="rows 0 to 9", remedy=REMEDY, tries=4, sleep=again.append)
    assert again == waits
    other = []
    with pytest.raises(OSError, match="failed 4 times"):
        with_retries(Faulty(array, *[fault] * 9), what="rows 10 to 19", remedy=REMEDY, tries=4, sleep=other.append)
    assert other != waits


def test_waits_grow_to_a_limit(array):
    waits = []
    with_retries(Faulty(array, *[TimeoutError()] * 9), what="w", remedy=REMEDY, tries=10, sleep=waits.append)
    assert max(waits) <= 60 and sum(waits) > 100


@pytest.mark.parametrize(
    "fault", [KeyError("k"), TypeError("t"), RuntimeError("a bug"), MemoryError(), KeyboardInterrupt()]
)
def test_what_is_no_fault_of_reading_passes_as_it_is(array, fault):
    with pytest.raises(type(fault)) as error:
        with_retries(Faulty(array, fault), what="w", remedy=REMEDY, sleep=pytest.fail)
    assert error.value is fault


def test_at_least_one_try():
    with pytest.raises(ValueError, match="0 tries; at least one is needed"):
        with_retries(int, what="w", remedy=REMEDY, tries=0)


def test_credentials_never_reach_messages_or_logs(array, caplog):
    text = (
        "curlCode: 28 via http://me:geheim@proxy:3128/x and https://b/o?X-Amz-Signature=geheim&X-Amz-Credential=geheim"
    )
    assert "geheim" not in redact(text) and "http://***@proxy:3128/x" in redact(text)
    assert redact("s3://bucket/a@b: plain") == "s3://bucket/a@b: plain"
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="failed 2 times") as error:
        with_retries(Faulty(array, *[OSError(text)] * 2), what="w", remedy=REMEDY, tries=2, sleep=lambda _: None)
    assert "geheim" not in str(error.value) and error.value.__cause__ is None
    assert "geheim" not in caplog.text
