"""Stores and sources in object storage, against an S3 server that checks signatures."""

import http.server
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import cellxgene_census
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tiledbsoma as soma

from tests.s3_server import ACCESS_KEY, REGION, SECRET_KEY, S3Server, environment, s3_server
from txfm_data import address
from txfm_data.address import redact, tiledb_config

WRONG_KEY, WRONG_SECRET = "AKIDUNKNOWN000000000", "wrong/secret+that0must1not2be3seen"


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(running: S3Server) -> Iterator[S3Server]:
    with environment(running.environment()):
        yield running


def context(**settings: Any) -> soma.SOMATileDBContext:
    return soma.SOMATileDBContext(tiledb_config=tiledb_config() | settings)


ANONYMOUS = {"vfs.s3.no_sign_request": "true"}


def make_matrix(uri: str, rows: int = 1_000) -> None:
    """A collection that holds one matrix: a random number at each (i, i % 100)."""
    i, values = np.arange(rows), np.random.default_rng(0).integers(0, 2**32, rows, np.uint32)
    with soma.Collection.create(uri, context=context()) as top:
        top.metadata["kind"] = "test"
        with top.add_new_sparse_ndarray("x", type=pa.uint32(), shape=(1, 100)):
            pass
    with soma.open(f"{uri}/x", "w", context=context()) as x:
        x.resize((rows, 100))
    with soma.open(f"{uri}/x", "w", context=context()) as x:
        x.write(pa.table({"soma_dim_0": i, "soma_dim_1": i % 100, "soma_data": values}))


def count(uri: str, **settings: Any) -> int:
    with soma.open(f"{uri}/x", context=context(**settings)) as x:
        return int(x.read().tables().concat().num_rows)


def test_tiledb_writes_reads_and_deletes(s3: S3Server) -> None:
    uri = f"s3://{s3.bucket}/a store+1/m"  # a name that must be encoded in URLs
    make_matrix(uri, 1_500_000)
    assert count(uri) == 1_500_000
    with soma.open(f"{uri}/x", "d", context=context()) as x:
        x.delete_cells((slice(900, 1_499_999),))
    assert count(uri) == 900
    files = address.list_files(uri)
    assert max(files.values()) > 5 * 1024**2  # came in several parts
    assert any(name.startswith("x/__fragments/") for name in files)
    listed = s3.client().list_objects_v2(Bucket=s3.bucket, Prefix="a store+1/m/")["Contents"]
    assert files == {entry["Key"].removeprefix("a store+1/m/"): entry["Size"] for entry in listed}


def test_tiledb_finds_keys_in_the_file_of_the_user(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{s3.bucket}/keys"
    make_matrix(uri)
    keys = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    (tmp_path / "credentials").write_text(f"[default]\n{keys.replace('not', 'NOT')}\n[mine]\n{keys}")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert count(uri) == 1_000
    assert len(address.list_files(uri)) > 5
    monkeypatch.setenv("AWS_PROFILE", "default")
    with pytest.raises(PermissionError, match="the secret key does not belong"), address.clear_errors(uri):
        count(uri)
    with pytest.raises(PermissionError, match="the secret key does not belong"):
        address.list_files(uri)


def test_census_opens_it_signed_and_anonymous(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = f"s3://{s3.bucket}/census", f"s3://{s3.public_bucket}/census"
    make_matrix(private)
    make_matrix(public)
    signed = {"vfs.s3.no_sign_request": "false"}  # the package's own default is not to sign
    with cellxgene_census.open_soma(uri=private, tiledb_config=tiledb_config() | signed) as census:
        assert census.metadata["kind"] == "test"
        assert census["x"].nnz == 1_000
    with pytest.raises(PermissionError, match="access denied"), address.clear_errors(private):
        cellxgene_census.open_soma(uri=private, tiledb_config=tiledb_config())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with cellxgene_census.open_soma(uri=public, tiledb_config=tiledb_config()) as census:
        assert census["x"].nnz == 1_000
    assert count(public, **ANONYMOUS) == 1_000
    with pytest.raises(PermissionError, match="access denied"), address.clear_errors(private):
        count(private, **ANONYMOUS)


@pytest.fixture
def h5ad(tmp_path: Path, s3: S3Server) -> tuple[ad.AnnData, str]:
    """An h5ad file of about 74 MB in the bucket, and what it holds."""
    rng = np.random.default_rng(0)
    n, nnz = 30_000, 200
    counts = sp.csr_matrix(
        (rng.integers(1, 2**31, n * nnz).astype(np.int64), np.tile(np.arange(0, 1_000, 5), n), np.arange(n + 1) * nnz),
        shape=(n, 1_000),
    )
    index = [f"cell{i}" for i in range(n)]
    adata = ad.AnnData(counts, pd.DataFrame({"batch": ["a", "b"] * (n // 2)}, index=index))
    adata.write_h5ad(tmp_path / "file.h5ad")
    client = s3.client()
    with (tmp_path / "file.h5ad").open("rb") as file:
        client.put_object(Bucket=s3.bucket, Key="in/file.h5ad", Body=file)
    client.close()
    return adata, f"s3://{s3.bucket}/in/file.h5ad"


def test_h5ad_is_read_in_part(h5ad: tuple[ad.AnnData, str]) -> None:
    adata, uri = h5ad
    expected: sp.csr_matrix = adata.X
    with address.open_binary(uri) as file, h5py.File(file, "r") as f:
        rows = ad.io.sparse_dataset(f["X"])[5_000:5_010]
        assert (rows != expected[5_000:5_010]).nnz == 0
        assert ad.io.read_elem(f["obs"])["batch"].tolist() == adata.obs["batch"].tolist()
        cache: Any = getattr(file, "cache")  # noqa: B009 - fsspec's, which the type of a file does not have
        assert cache.total_requested_bytes < cache.size / 2
        for start in range(0, 30_000, 5_000):
            assert (ad.io.sparse_dataset(f["X"])[start : start + 5_000] != expected[start : start + 5_000]).nnz == 0
        assert cache.maxblocks * cache.blocksize == 64 * 1024**2


def test_files_below_a_name(s3: S3Server) -> None:
    client = s3.client()
    for key in ("t/one", "t/a b/[x]*", "t/a b/ü?", "t2/other", "t/[x]/y", "tx"):
        client.put_object(Bucket=s3.bucket, Key=key, Body=b"12")
    root = f"s3://{s3.bucket}/t"
    assert address.list_files(root) == {"[x]/y": 2, "a b/[x]*": 2, "a b/ü?": 2, "one": 2}
    assert address.list_files(root + "/") == address.list_files(root)
    with pytest.raises(NotADirectoryError):
        address.list_files(f"{root}/one")
    with pytest.raises(IsADirectoryError):
        address.open_binary(root)
    for absent in (f"{root}/no", "s3://no-such-bucket/x"):
        assert not address.exists(absent)
        with pytest.raises(FileNotFoundError):
            address.list_files(absent)
        with pytest.raises(FileNotFoundError):
            address.open_binary(absent)
        if "no-such" not in absent:
            address.remove_tree(absent)
    assert address.exists(root)
    assert address.exists(f"{root}/one")
    address.remove_tree(f"{root}/[x]")
    address.remove_tree(f"{root}/a b")
    assert address.list_files(root) == {"one": 2}
    address.remove_tree(root)
    assert not address.exists(root)
    assert address.list_files(f"s3://{s3.bucket}/t2") == {"other": 2}
    for bucket in (f"s3://{s3.bucket}", f"s3://{s3.bucket}/"):
        with pytest.raises(ValueError, match="a whole bucket"):
            address.remove_tree(bucket)
    client.close()


def test_more_files_than_one_answer_lists(s3: S3Server) -> None:
    client = s3.client()
    for i in range(1_005):
        client.put_object(Bucket=s3.bucket, Key=f"many/{i}", Body=b"")
    client.close()
    root = f"s3://{s3.bucket}/many"
    assert len(address.list_files(root)) == 1_005
    address.remove_tree(root)
    assert not address.exists(root)


def test_what_another_client_writes_is_seen_at_once(s3: S3Server) -> None:
    root = f"s3://{s3.bucket}/fresh"
    assert not address.exists(root)
    client = s3.client()
    client.put_object(Bucket=s3.bucket, Key="fresh/a", Body=b"1")
    assert address.list_files(root) == {"a": 1}
    client.put_object(Bucket=s3.bucket, Key="fresh/a", Body=b"123")
    assert address.list_files(root) == {"a": 3}
    client.close()


def with_tiledb(uri: str) -> None:
    with address.clear_errors(uri), soma.open(uri, context=context()):
        pass


def with_tiledb_writing(uri: str) -> None:
    with address.clear_errors(uri), soma.Collection.create(uri, context=context()):
        pass


def with_fsspec(uri: str) -> None:
    address.open_binary(uri).close()


WAYS: list[Callable[[str], object]] = [
    with_tiledb, with_tiledb_writing, with_fsspec, address.exists, address.list_files, address.remove_tree,
]  # fmt: skip
TROUBLES = {
    "unknown key": ({"AWS_ACCESS_KEY_ID": WRONG_KEY}, PermissionError, "AWS_ACCESS_KEY_ID"),
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": WRONG_SECRET}, PermissionError, "AWS_SECRET_ACCESS_KEY"),
    "no keys": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, PermissionError, "AWS_ACCESS_KEY_ID"),
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_refusals_name_the_remedy_and_no_secret(
    s3: S3Server, way: Callable[[str], object], trouble: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    variables, kind, remedy = TROUBLES[trouble]
    caplog.set_level(logging.DEBUG)
    uri = f"s3://{s3.bucket}/x/y"
    with environment(s3.environment() | variables), pytest.raises(kind, match=remedy) as caught:
        way(uri)
    said = f"{caught.value!r} {caught.value}"
    assert uri in said
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    seen = "\n".join([said, *capfd.readouterr(), caplog.text])
    for secret in (SECRET_KEY, WRONG_SECRET):
        assert secret not in seen
    for key in (ACCESS_KEY, WRONG_KEY):
        assert key not in said


@pytest.mark.parametrize("way", [with_tiledb, with_tiledb_writing], ids=lambda way: way.__name__)
def test_a_bucket_that_is_not_there(s3: S3Server, way: Callable[[str], object]) -> None:
    with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/x: no such bucket"):
        way("s3://no-such-bucket/x")


def test_nobody_answers(s3: S3Server) -> None:
    endpoint = {"AWS_ENDPOINT_URL": "http://me:hiddenpassword@127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}
    with environment(s3.environment() | endpoint), pytest.raises(ConnectionError, match="AWS_ENDPOINT_URL") as caught:
        with_tiledb(f"s3://{s3.bucket}/x")
    assert "hiddenpassword" not in str(caught.value)


def test_raw_errors_of_tiledb_hold_no_secret_after_redaction(s3: S3Server) -> None:
    """An unknown key must not pass for a store that is not there: TileDB raises the same class for both."""
    with (
        environment(s3.environment() | {"AWS_ACCESS_KEY_ID": WRONG_KEY}),
        pytest.raises(soma.DoesNotExistError) as caught,
    ):
        soma.open(f"s3://{s3.bucket}/x", context=context())
    assert isinstance(address.explain(caught.value, "s3://b/x"), PermissionError)
    with pytest.raises(soma.DoesNotExistError) as caught:
        soma.open(f"s3://{s3.bucket}/nothing", context=context())
    assert address.explain(caught.value, "s3://b/x") is None
    assert SECRET_KEY not in redact(str(caught.value))


@pytest.mark.parametrize("way", [with_tiledb, address.exists], ids=lambda way: way.__name__)
def test_requests_go_through_the_proxy(
    s3: S3Server, way: Callable[[str], object], capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str | None]] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Proxy-Authorization"]))
            self.send_error(403, "Forbidden")

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    variables = {
        "AWS_ENDPOINT_URL": "http://storage.invalid",
        "HTTP_PROXY": f"http://me:hiddenpassword@127.0.0.1:{proxy.server_port}",
    }
    try:
        with environment(s3.environment() | variables), pytest.raises(PermissionError) as caught:
            way("s3://bucket/x")
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
    assert asked[0][0].startswith("http://storage.invalid")
    assert asked[0][1] == "Basic bWU6aGlkZGVucGFzc3dvcmQ="
    assert "hiddenpassword" not in "".join([str(caught.value), *capfd.readouterr()])


def test_the_door_refuses_what_was_changed_under_way(s3: S3Server) -> None:
    """The server really checks: the same request is let in with its signature and refused with another's."""
    import urllib.error
    import urllib.request

    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for secret, code in ((SECRET_KEY, 200), (WRONG_SECRET, 403)):
        request = AWSRequest("GET", f"{s3.endpoint}/{s3.bucket}?list-type=2&prefix=")
        S3SigV4Auth(Credentials(ACCESS_KEY, secret), "s3", REGION).add_auth(request)
        try:
            with opener.open(urllib.request.Request(request.url, headers=dict(request.headers))) as reply:
                found = reply.status
        except urllib.error.HTTPError as error:
            found = error.code
            error.close()
        assert found == code
