"""Bytes of a corpus from folders, web servers and object stores: faults on the way, the cache, and replaced shards."""

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shards import manifest as mf
from shards.blocks import BlockReader
from shards.codec import Block
from shards.files import CacheConfig, CachedFiles, DirectFiles, Files, open_files
from shards.manifest import Corpus
from shards.verify import verify
from tests.s3_server import S3Server, environment, s3_server
from tests.shards.corpus_maker import Plan, make_corpus, sample_of
from tests.shards.web_server import WebServer, web_server
from tools import info
from tools import verify as verify_verb

FIRST = "train-000000.tar"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("files") / "good", Plan(weights=(1.0, 0.5)))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "corpus")


@pytest.fixture
def web(folder: Path) -> Iterator[WebServer]:
    with environment({}), web_server(folder) as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been slept between tries."""
    found: list[float] = []
    monkeypatch.setattr("txfm_data.retry.time.sleep", found.append)
    return found


def is_right(block: Block) -> bool:
    """Whether the samples of a block are what the maker of corpora puts there."""
    samples = block.samples()
    return len(block) == 7 and all(
        np.array_equal(samples.counts[samples.indptr[i] : samples.indptr[i + 1]], sample_of(int(s), int(d)).counts)
        for i, (s, d) in enumerate(zip(block.sample_id, block.dataset, strict=True))
    )


# A folder


def test_ranges_of_a_local_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(200)))
    files = open_files(tmp_path, CacheConfig(folder=str(tmp_path / "unused")))
    assert isinstance(files, DirectFiles) and not (tmp_path / "unused").exists()
    assert files.read("x", 0, 200) == files.fetch("x", 200) == bytes(range(200))
    assert files.read("x", 3, 4) == bytes([3, 4, 5, 6]) and files.read("x", 200, 0) == b""
    assert files.sizes([]) == {"x": 200} and not files.forget("x", 3, 4)
    with pytest.raises(
        ValueError, match=f"{tmp_path}/x: bytes 150 to 250: .*ends too early: 50 of 100 bytes from byte 150"
    ):
        files.read("x", 150, 100)
    with pytest.raises(ValueError, match="x: more than 199 bytes"):
        files.fetch("x", 199)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/y: bytes 0 to 1: not there"):
        files.read("y", 0, 1)
    with pytest.raises(ValueError, match="leads out of"):
        files.read("../x", 0, 1)


def test_a_shard_replaced_while_it_is_open(folder: Path, tmp_path: Path) -> None:
    reader = BlockReader(Corpus(folder), "train")
    assert is_right(reader.read(0))
    shutil.copy(folder / FIRST, tmp_path / "same")
    os.replace(tmp_path / "same", folder / FIRST)
    assert is_right(reader.read(1))
    foreign = make_corpus(tmp_path / "foreign", Plan(seed=1)) / FIRST
    os.replace(foreign, folder / FIRST)
    with pytest.raises(ValueError, match=f"{FIRST}: block at byte 3072: .*of another corpus"):
        reader.read(1)
    (folder / FIRST).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{FIRST}: bytes 3072 to 6144: .*ends too early: 0 of 3072 bytes"):
        reader.read(1)
    (folder / FIRST).unlink()
    with pytest.raises(FileNotFoundError, match=f"{FIRST}.*copy the corpus again"):
        reader.read(1)
    assert is_right(reader.read(4))


class Faulty:
    """Files whose reads come back wrong, by a list of what is to happen; then they are right."""

    def __init__(self, inner: Files, faults: list[object]) -> None:
        self._inner, self.faults = inner, faults

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        data = self._inner.read(name, offset, length)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        return fault(data) if callable(fault) else data


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (lambda data: data[:-600], ValueError), (lambda data: data[:100], ValueError), (lambda data: b"", ValueError),
        (lambda data: data[512:], ValueError), (lambda data: data + data, ValueError), (lambda data: bytes(len(data)), ValueError),
        (lambda data: data[:600] + bytes(600) + data[1200:], ValueError), (OSError(5, "Input/output error"), OSError),
    ],
)  # fmt: skip
def test_files_that_give_wrong_bytes_never_give_a_wrong_block(
    folder: Path, fault: object, kind: type[Exception]
) -> None:
    corpus = Corpus(folder)
    corpus.files = Faulty(corpus.files, [fault])  # type: ignore[assignment]
    reader = BlockReader(corpus, "train")
    with pytest.raises(kind, match=r"block at byte 3072|Input/output"):
        reader.read(1)
    assert is_right(reader.read(1))


def test_many_threads_read_right_blocks(folder: Path) -> None:
    reader = BlockReader(Corpus(folder), "train")
    with ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(reader.read, list(range(len(reader))) * 5))
    assert all(map(is_right, blocks)) and len({b.sample_id.tobytes() for b in blocks}) == len(reader) == 12


# A web server


def test_a_corpus_on_the_web(web: WebServer, folder: Path) -> None:
    corpus = Corpus(web.url)
    assert corpus.fingerprint == Corpus(folder).fingerprint
    assert np.array_equal(corpus.train_samples()[0], Corpus(folder).train_samples()[0])
    web.served.clear()
    assert all(is_right(BlockReader(corpus, "val").read(i)) for i in range(4))
    assert web.served[1] == "/val-000000.tar bytes=3072-6143"
    assert verify(corpus)["n_train"] == 84
    with pytest.raises(ValueError, match="a remote address where a path"):
        _ = corpus.path
    (folder / FIRST).rename(folder / "gone")
    with pytest.raises(FileNotFoundError, match=f"{web.url}/{FIRST}: missing, though the manifest names it"):
        Corpus(web.url)


@pytest.mark.parametrize(
    "faults", [["500"], ["503", "429"], ["short", "cut"], ["cut", "502", "short", "408"]], ids=lambda f: "+".join(f)
)
def test_passing_faults_end_in_the_right_block(web: WebServer, waits: list[float], faults: list[str]) -> None:
    reader = BlockReader(Corpus(web.url), "train")
    web.faults = list(faults)
    assert is_right(reader.read(5))
    assert not web.faults and len(waits) == len(faults)
    assert all(0.5 * 2**i <= wait <= 2**i for i, wait in enumerate(waits))


@pytest.mark.parametrize(
    ("fault", "kind", "message", "tries"),
    [
        ("500", OSError, "failed 5 times.*check the connection and the address, or copy the corpus again", 5),
        ("short", OSError, "failed 5 times, last with: the file ends too early: 1536 of 3072 bytes from byte 0", 5),
        ("cut", OSError, "failed 5 times", 5), ("403", PermissionError, "access refused", 1),
        ("404", FileNotFoundError, "not there", 1),
        ("400", ValueError, "cannot be read", 1), ("416", ValueError, "cannot be read", 1),
        ("whole", ValueError, "20480 bytes came where 3072 from byte 0 were asked for: the server serves no ranges", 1),
    ],
)  # fmt: skip
def test_lasting_faults_are_named(
    web: WebServer, waits: list[float], fault: str, kind: type[Exception], message: str, tries: int
) -> None:
    reader = BlockReader(Corpus(web.url), "train")
    web.faults, web.served = [fault] * 9, []
    with pytest.raises(kind, match=f"{web.url}/{FIRST}: bytes 0 to 3072: .*{message}") as caught:
        reader.read(0)
    assert type(caught.value) is kind and (len(web.served), len(waits)) == (tries, tries - 1)


def test_a_shard_replaced_on_the_web(web: WebServer, waits: list[float], folder: Path, tmp_path: Path) -> None:
    reader = BlockReader(Corpus(web.url, CacheConfig(folder=str(tmp_path / "cache"))), "train")
    assert is_right(reader.read(0))
    shutil.copy(make_corpus(tmp_path / "foreign", Plan(seed=1)) / FIRST, folder / FIRST)
    assert is_right(reader.read(0))  # as it was when the corpus was opened
    with pytest.raises(ValueError, match=f"{FIRST}: block at byte 3072: .*of another corpus"):
        reader.read(1)
    (folder / FIRST).unlink()
    with pytest.raises(FileNotFoundError, match=FIRST):
        reader.read(2)


def test_a_forked_process_reads_too(web: WebServer) -> None:
    reader = BlockReader(Corpus(web.url), "train")
    assert is_right(reader.read(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which data loaders do
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if is_right(reader.read(1)) else 2
        finally:
            os._exit(code)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child reads for ever")


# The cache


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.txfm-block"))


def test_what_was_read_is_not_asked_for_again(web: WebServer, tmp_path: Path) -> None:
    config = CacheConfig(folder=str(tmp_path / "cache"))
    reader = BlockReader(Corpus(web.url, config), "train")
    assert is_right(reader.read(3)) and is_right(reader.read(2))
    web.served.clear()
    assert is_right(reader.read(3))
    again = Corpus(web.url, config)
    web.served.clear()
    assert is_right(BlockReader(again, "train").read(2)) and web.served == []
    assert len(kept(tmp_path / "cache")) == 2 and sum(p.stat().st_size for p in kept(tmp_path / "cache")) == 6_144
    assert verify(again)["n_val"] == 28 and len(web.served) > 16 and len(kept(tmp_path / "cache")) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "other"])
def test_a_damaged_block_of_the_cache_is_fetched_again(web: WebServer, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    reader = BlockReader(Corpus(web.url, CacheConfig(folder=str(cache))), "train")
    reader.read(0)
    [path] = kept(cache)
    data = path.read_bytes()
    reader.read(1)
    other = next(p for p in kept(cache) if p != path).read_bytes()
    changed = bytearray(data)
    changed[700] ^= 1
    path.write_bytes(
        {"flip": bytes(changed), "cut": data[:-1], "empty": b"", "longer": data + b"x", "other": other}[damage]
    )
    web.served.clear()
    assert is_right(reader.read(0))
    assert len(web.served) == 1 and path.read_bytes() == data
    assert is_right(reader.read(0)) and len(web.served) == 1


def test_damage_at_the_source_is_told_after_one_more_try(web: WebServer, folder: Path, tmp_path: Path) -> None:
    reader = BlockReader(Corpus(web.url, CacheConfig(folder=str(tmp_path / "cache"))), "train")
    data = bytearray((folder / FIRST).read_bytes())
    data[700] ^= 1
    (folder / FIRST).write_bytes(bytes(data))
    web.served.clear()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{FIRST}: block at byte 0: its CRC-32"):
            reader.read(0)
    assert len(web.served) <= 4


def test_the_cache_keeps_its_bound_and_what_was_used_last(folder: Path, web: WebServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "mine.txt").write_text("of somebody else")
    stale = cache / f"{'0' * 32}.00000000.txfm-block-tmp"
    stale.write_bytes(bytes(1_000))
    os.utime(stale, (time.time() - 90_000,) * 2)
    data = np.random.default_rng(0).bytes(2_000_000)
    (folder / "large").write_bytes(data)
    files = CachedFiles(DirectFiles(web.url), CacheConfig(folder=str(cache), max_bytes=1024**2))
    for start in range(0, 2_000_000, 20_000):
        assert files.read("large", start, 20_000) == data[start : start + 20_000]
        assert files.read("large", 0, 20_000) == data[:20_000]  # in use all the time
        assert sum(p.stat().st_size for p in cache.iterdir()) <= 1024**2
    assert len(kept(cache)) > 30
    web.served.clear()
    files.read("large", 0, 20_000)
    files.read("large", 1_980_000, 20_000)
    assert web.served == []
    files.read("large", 40_000, 20_000)
    assert len(web.served) == 1
    before = len(kept(cache))
    assert (
        files.read("large", 0, 300_000) == data[:300_000] and len(kept(cache)) == before
    )  # more than a quarter is not kept
    assert (cache / "mine.txt").read_text() == "of somebody else" and not stale.exists()


READER = """
import random, sys
from shards.files import CacheConfig, CachedFiles, DirectFiles
url, cache, seed, path = sys.argv[1:]
data = open(path, "rb").read()
files = CachedFiles(DirectFiles(url), CacheConfig(folder=cache, max_bytes=2**20))
rng = random.Random(int(seed))
for _ in range(150):
    start = 10_000 * rng.randrange(200)
    assert files.read("large", start, 10_000) == data[start:start + 10_000]
"""


def test_processes_share_the_cache(folder: Path, web: WebServer, tmp_path: Path) -> None:
    (folder / "large").write_bytes(np.random.default_rng(0).bytes(2_000_000))
    cache = tmp_path / "cache"
    command = [sys.executable, "-W", "error", "-c", READER, web.url, str(cache)]
    running = [subprocess.Popen([*command, str(i), str(folder / "large")]) for i in range(3)]
    largest = 0
    while any(process.poll() is None for process in running):
        sizes = [os.stat(p).st_size for p in cache.glob("*") if p.exists()] if cache.exists() else []
        largest = max(largest, sum(sizes))
        time.sleep(0.02)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert 0 < largest <= 2**20


def test_a_cache_that_cannot_be_written_is_no_end(
    web: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    reader = BlockReader(Corpus(web.url, CacheConfig(folder=str(cache))), "train")
    shutil.rmtree(cache)
    cache.write_text("a file")
    assert is_right(reader.read(0))
    assert f"{cache}: a block could not be kept there" in caplog.text and "name another folder" in caplog.text
    with pytest.raises(OSError, match="cache"):
        Corpus(web.url, CacheConfig(folder=str(cache)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": ""}, "folder is empty"),
        ({"folder": "s3://b/c"}, "must be of this machine"),
        ({"folder": "x", "max_bytes": 10}, "1 MiB"),
    ],
)
def test_settings_of_the_cache(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**settings)  # type: ignore[arg-type]


def test_threads_share_one_reader_with_a_cache(web: WebServer, tmp_path: Path) -> None:
    reader = BlockReader(Corpus(web.url, CacheConfig(folder=str(tmp_path / "cache"))), "train")
    with ThreadPoolExecutor(6) as pool:
        assert all(map(is_right, pool.map(reader.read, list(range(12)) * 3)))
    assert len(kept(tmp_path / "cache")) == 12


# An object store


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def test_a_corpus_in_an_object_store(
    running: S3Server, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with environment(running.environment()):
        client = running.client()
        for path in good.iterdir():
            client.put_object(Bucket=running.bucket, Key=f"there/{path.name}", Body=path.read_bytes())
        address = f"s3://{running.bucket}/there"
        corpus = Corpus(address, CacheConfig(folder=str(tmp_path / "cache")))
        assert corpus.fingerprint == Corpus(good).fingerprint and corpus.train_samples()[0].shape == (84,)
        for reader in (BlockReader(corpus, split) for split in mf.SPLITS):
            assert all(is_right(reader.read(number)) for number in range(len(reader)))
        for main in (info.main, verify_verb.main):
            assert main([address]) == 0
            assert address in capsys.readouterr().out
        client.put_object(Bucket=running.bucket, Key="there/val-000001.tar", Body=b"x")
        with pytest.raises(ValueError, match=f"{address}/val-000001.tar: a shard that the manifest does not name"):
            Corpus(address)
        client.delete_object(Bucket=running.bucket, Key="there/val-000001.tar")
        client.put_object(Bucket=running.bucket, Key=f"there/{FIRST}", Body=b"x")
        with pytest.raises(ValueError, match=f"{FIRST}: 1 bytes, the manifest says 20480"):
            Corpus(address)
        with pytest.raises(OSError, match=f"{FIRST}"):
            DirectFiles(address, first_wait_s=0.001).read(FIRST, 3072, 3072)
        client.delete_object(Bucket=running.bucket, Key=f"there/{FIRST}")
        with pytest.raises(FileNotFoundError, match=f"{address}/{FIRST}: missing"):
            Corpus(address)
        with pytest.raises(FileNotFoundError, match=f"{address}/{FIRST}"):
            BlockReader(corpus, "train")._files.origin.read(FIRST, 0, 512)
        with pytest.raises(FileNotFoundError, match="no finished shard corpus"):
            Corpus(f"s3://{running.bucket}/nowhere")
        client.close()
