"""Corpora on object storage: built in scratch, uploaded with the manifest last, nothing half-finished taken for a corpus."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.manifest import Corpus
from shards.select import ShardConfig
from shards.verify import verify
from shards.writer import build_shards, plan_shards
from tests.s3_server import S3Server, environment, s3_server
from tests.shards.builds import files_of
from txfm_data import address
from txfm_data.store.opening import open_store

CONFIG = ShardConfig(block_rows=8, lanes=2, seed=3)


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(running: S3Server) -> Iterator[S3Server]:
    with environment(running.environment()):
        yield running


def objects(server: S3Server, prefix: str) -> dict[str, bytes]:
    """All below a prefix, read past the code under test."""
    client = server.client()
    found = client.list_objects_v2(Bucket=server.bucket, Prefix=prefix).get("Contents", [])
    return {
        entry["Key"].removeprefix(prefix): client.get_object(Bucket=server.bucket, Key=entry["Key"])["Body"].read()
        for entry in found
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory, known_zarr) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "c"
    build_shards(open_store(known_zarr), out, CONFIG)
    return files_of(out)


def test_a_corpus_is_uploaded_and_opens_there(s3, tmp_path, known_zarr, expected):
    out = f"s3://{s3.bucket}/one/corpus"
    store = open_store(known_zarr)
    assert plan_shards(store, out, CONFIG)["out"] == out and not objects(s3, "one/")
    result = build_shards(store, out, CONFIG, scratch=tmp_path / "scratch")
    assert objects(s3, "one/corpus/") == expected and result["out"] == out
    assert not list((tmp_path / "scratch").iterdir())
    assert verify(Corpus(out))["n_train"] == result["n_train"]
    for call in (build_shards, plan_shards):
        with pytest.raises(FileExistsError, match=r"s3://bucket/one/corpus: holds something already"):
            call(store, out, CONFIG)


def test_without_scratch_nothing_stays_on_this_machine(s3, tmp_path, known_zarr, expected, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    build_shards(open_store(known_zarr), f"s3://{s3.bucket}/two/", CONFIG)
    assert objects(s3, "two/") == expected
    monkeypatch.setattr("tempfile.tempdir", None)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("txfm-shard-")]


def test_an_upload_that_stopped_goes_on_and_is_no_corpus_until_the_end(s3, tmp_path, known_zarr, expected, monkeypatch):
    out, done = f"s3://{s3.bucket}/three", []
    plain = address.upload

    def stop(path: Path, place: str) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(Path(path).name)
        plain(path, place)

    monkeypatch.setattr(address, "upload", stop)
    store = open_store(known_zarr)
    with pytest.raises(KeyboardInterrupt):
        build_shards(store, out, CONFIG, scratch=tmp_path)
    assert sorted(objects(s3, "three/")) == sorted(done) and "manifest.json" not in done
    with pytest.raises(FileNotFoundError, match="no finished shard corpus"):
        Corpus(out)
    s3.client().put_object(Bucket=s3.bucket, Key="three/train-000009.tar", Body=b"of an older build")
    monkeypatch.setattr(address, "upload", plain)
    assert build_shards(store, out, CONFIG, scratch=tmp_path)["resumed"]
    assert objects(s3, "three/") == expected and not list(tmp_path.iterdir())


def test_the_manifest_goes_last(s3, tmp_path, known_zarr, expected, monkeypatch):
    order, plain = [], address.upload

    def note(path: Path, place: str) -> None:
        order.append(place.rpartition("/")[2])
        plain(path, place)

    monkeypatch.setattr(address, "upload", note)
    build_shards(open_store(known_zarr), f"s3://{s3.bucket}/four", CONFIG, scratch=tmp_path)
    assert sorted(order) == sorted(expected) and order[-1] == "manifest.json"


def test_what_cannot_be_uploaded_to_is_told(s3, tmp_path, known_zarr):
    store = open_store(known_zarr)
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        build_shards(store, "s3://nobucket/c", CONFIG, scratch=tmp_path / "scratch")
    s3.client().put_object(Bucket=s3.bucket, Key="five/mine.txt", Body=b"x")
    with pytest.raises(FileExistsError, match=r"holds something already \(mine.txt\)"):
        build_shards(store, f"s3://{s3.bucket}/five", CONFIG)
    assert objects(s3, "five/") == {"mine.txt": b"x"}
    with pytest.raises(ValueError, match="no scheme"):
        build_shards(store, "ftp://x/c", CONFIG)
    with environment(s3.environment() | {"AWS_SECRET_ACCESS_KEY": "wrong/secret+that0must1not2be3seen"}):
        with pytest.raises(PermissionError, match="check AWS_SECRET_ACCESS_KEY") as error:
            build_shards(store, f"s3://{s3.bucket}/six", CONFIG)
    assert "wrong/secret" not in str(error.value)


def test_upload_of_one_file(s3, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    address.upload(tmp_path / "a", f"s3://{s3.bucket}/up/a")
    assert objects(s3, "up/") == {"a": b"abc"}
    with pytest.raises(ValueError, match="uploads go to object storage"):
        address.upload(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        address.upload(tmp_path / "a", "s3://nobucket/a")
    with pytest.raises(FileNotFoundError):
        address.upload(tmp_path / "none", f"s3://{s3.bucket}/up/b")
