"""SOMA stores on object storage, end to end, against an S3 server that checks signatures."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cellxgene_census
import numpy as np
import pytest

from tests.conftest import GENES_A, GENES_B, make_adata
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, environment, s3_server
from tools import cli
from txfm_data import address, ingest
from txfm_data.address import tiledb_config
from txfm_data.store import layout, ledger, objects
from txfm_data.store.describe import describe
from txfm_data.store.opening import open_store
from txfm_data.store.verify import verify

OPTIONS: dict[str, Any] = {"batch": "batch", "cell_type": "cell_type", "obs_columns": ()}
ROOT = Path(__file__).resolve().parents[2]
PLAIN_RECORD = ledger.record
WRONG_SECRET = "wrong/secret+that0must1not2be3seen"


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(running: S3Server) -> Iterator[S3Server]:
    with environment(running.environment()):
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three h5ad files with overlapping genes."""
    folder = tmp_path_factory.mktemp("h5ad")
    for seed, (name, genes, n_obs) in enumerate([("a", GENES_A, 24), ("b", GENES_B, 18), ("c", range(80, 120), 12)]):
        make_adata(seed, genes, n_obs=n_obs).write_h5ad(folder / f"{name}.h5ad")
    return [folder / f"{name}.h5ad" for name in "abc"]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, files: list[Path]) -> list[Path]:
    """Stores of the first one, two and three files, on this machine. Read them only."""
    folder = tmp_path_factory.mktemp("stores")
    for n in (1, 2, 3):
        for file in files[:n]:
            ingest.h5ad(file, folder / f"{n}", file.stem, **OPTIONS)
    return [folder / f"{n}" for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def made(running: S3Server, files: list[Path]) -> str:
    """A store of the first two files, ingested in the bucket itself; the first file is in the bucket too. Read it only."""
    with environment(running.environment()):
        client = running.client()
        client.put_object(Bucket=running.bucket, Key="in/a.h5ad", Body=files[0].read_bytes())
        uri = f"s3://{running.bucket}/made/store"
        ingest.h5ad(f"s3://{running.bucket}/in/a.h5ad", uri, "a", **OPTIONS)
        ingest.h5ad(files[1], f"{uri}/", "b", **OPTIONS)
    return uri


def upload(server: S3Server, folder: Path, name: str) -> str:
    """Copy a local store into the bucket."""
    client = server.client()
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{name}/{path.relative_to(folder).as_posix()}"
            client.put_object(Bucket=server.bucket, Key=key, Body=path.read_bytes())
    return f"s3://{server.bucket}/{name}"


def contents(where: str | Path) -> dict[str, Any]:
    """Everything that readers see of a store."""
    store = open_store(where)
    ids = np.arange(0, store.n_obs, 3)
    parts = [part for _, part in store.scan(0, store.n_obs, rows=10)]
    some, filtered = store.read_rows(ids), store.obs(["cell_type"], value_filter="cell_type == 'B cell'")
    return {
        "records": [repr(record) for record in store.datasets],
        "genes": (store.vocabulary.gene_ids, store.vocabulary.symbols),
        "panels": [store.panel(record).tolist() for record in store.datasets],
        "gene_nnz": [store.gene_nnz(record).tolist() for record in store.datasets],
        "obs": store.obs().to_pylist(),
        "filtered": filtered.to_pylist(),
        "counts": [(p.indptr.tolist(), p.gene_ids.tolist(), p.counts.tolist()) for p in [*parts, some]],
        "values": (store.values, str(store.dtype)),
    }


def test_it_is_the_store_that_a_local_ingest_makes(s3: S3Server, made: str, local: list[Path]) -> None:
    assert contents(made) == contents(local[1])
    result = verify(made)
    assert (result["n_obs"], result["n_datasets"], result["unfinished"]) == (42, 2, False)
    names = set(address.list_files(made))
    assert result["n_files"] == len(names) - 1 and objects.LIST in names and objects.MARK not in names
    there, here = describe(made), describe(local[1])
    assert there.pop("bytes") == sum(address.list_files(made).values()) and there.pop("bytes_per_sample") > 0
    assert there == {**{k: v for k, v in here.items() if not k.startswith("bytes")}, "path": made}
    assert not [name for name in address.list_files(f"s3://{s3.bucket}/made") if name.endswith(".lock")]


def test_the_census_package_reads_it_signed(s3: S3Server, made: str) -> None:
    signed = tiledb_config() | {"vfs.s3.no_sign_request": "false"}  # the package's own default is not to sign
    with cellxgene_census.open_soma(uri=made, tiledb_config=signed) as census:
        human = census["census_data"]["homo_sapiens"]
        assert human.obs.count == 42
        adata = cellxgene_census.get_anndata(census, "homo_sapiens", obs_value_filter="cell_type == 'B cell'")
    store = open_store(made)
    ids = store.obs(["soma_joinid"], "cell_type == 'B cell'")["soma_joinid"].to_numpy()
    assert adata.X.sum() == store.read_rows(ids).counts.sum()
    with pytest.raises(PermissionError, match="access denied"), address.clear_errors(made):
        cellxgene_census.open_soma(uri=made, tiledb_config=tiledb_config())  # anonymous: the bucket is not public


def test_the_verbs_take_its_address(
    s3: S3Server, made: str, files: list[Path], local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> dict[str, Any]:
        assert cli.main([*arguments, "--json"]) == 0, capsys.readouterr().err
        return dict(json.loads(capsys.readouterr().out))

    assert run("info", made)["n_obs"] == 42
    assert run("verify", made)["nnz"] == verify(local[1])["nnz"]
    shard = ["--val-batches", "0.25", "--lanes", "2", "--block", "4"]
    run("shard", "--store", made, "--out", str(tmp_path / "there"), *shard)
    run("shard", "--store", str(local[1]), "--out", str(tmp_path / "here"), *shard)
    there, here = (
        sorted(p.relative_to(tmp_path / x) for p in (tmp_path / x).rglob("*.tar")) for x in ("there", "here")
    )
    assert there == here and there
    assert all((tmp_path / "there" / p).read_bytes() == (tmp_path / "here" / p).read_bytes() for p in there)
    uri = f"s3://{s3.bucket}/verbs"
    named = ["--store", uri, "--dataset", "a", "--values", "counts", "--batch", "batch", "--cell-type", "cell_type"]
    assert run("ingest", "h5ad", str(plain(tmp_path)), *named)["n_obs"] == 24
    assert contents(uri)["counts"] == contents(local[0])["counts"]


def plain(folder: Path) -> Path:
    """The first file, without the label that a store has no column for."""
    adata = make_adata(0, GENES_A, n_obs=24)
    del adata.obs["guide"]
    adata.write_h5ad(folder / "a.h5ad")
    return folder / "a.h5ad"


class Stop(Exception):
    """What the tests throw into an append."""


def writes(monkeypatch: pytest.MonkeyPatch, act: Callable[[str, int], None]) -> None:
    """Call `act` with address and number of each array that is opened for writing, before it is."""
    plain, count = layout.open_element, [0]

    def opening(uri: str, mode: Any = "r", **options: Any) -> Any:
        if mode == "w":
            count[0] += 1
            act(uri, count[0])
        return plain(uri, mode, **options)

    monkeypatch.setattr(layout, "open_element", opening)


@pytest.mark.slow
def test_an_append_that_fails_at_any_step_leaves_what_was(
    s3: S3Server,
    files: list[Path],
    local: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri = upload(s3, local[1], "fails")
    before = contents(uri)
    for step in ("/X/raw", "/obs", "commit"):
        raised = []

        def stop(element: str, number: int, step: str = step, raised: list[str] = raised) -> None:
            if element.endswith(step) and not raised:
                raised.append(element)
                assert open_store(uri).n_obs == 42
                raise Stop

        with monkeypatch.context() as patch:
            writes(patch, stop)
            if step == "commit":
                patch.setattr("txfm_data.store.ledger.record", _raise_on_commit)
            with pytest.raises(Stop):
                ingest.h5ad(files[2], uri, "c", **OPTIONS)
        assert contents(uri) == before
        assert not verify(uri)["unfinished"] and not address.exists(f"{uri}.lock")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        writes(patch, lambda element, number: stop_at_var(element))  # rolling back writes var too, so it fails as well
        ingest.h5ad(files[2], uri, "c", **OPTIONS)
    assert "not rolled back" in caplog.text
    assert contents(uri) == before and verify(uri)["unfinished"]
    ingest.h5ad(files[2], uri, "c", **OPTIONS)
    assert contents(uri) == contents(local[2])
    verify(uri)


def stop_at_var(element: str) -> None:
    if element.endswith("/var"):
        raise Stop


def _raise_on_commit(store_uri: str, event: str, dataset: str, detail: Any) -> None:
    if event == "commit":
        raise Stop
    PLAIN_RECORD(store_uri, event, dataset, detail)


def test_a_first_append_that_fails_leaves_nothing(
    s3: S3Server, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{s3.bucket}/first"

    def look(element: str, number: int) -> None:
        with pytest.raises(FileNotFoundError, match="no store there"):
            open_store(uri)
        if element.endswith("/var"):
            raise Stop

    writes(monkeypatch, look)
    with pytest.raises(Stop):
        ingest.h5ad(files[0], uri, "a", **OPTIONS)
    assert not address.exists(uri) and not address.exists(f"{uri}.lock")


KILLED = """
import os, signal, sys
from txfm_data import ingest
from txfm_data.store import layout, ledger, objects
plain, (file, uri, step) = layout.open_element, sys.argv[1:]
def opening(element, mode="r", **options):
    if mode == "w" and element.endswith(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(element, mode, **options)
def listing(address, n_datasets, write=objects.write_list):
    if n_datasets == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(address, n_datasets)
layout.open_element = opening
if step == "list":
    objects.write_list = listing
ingest.h5ad(file, uri, "c" if "c.h5ad" in file else "a", batch="batch", cell_type="cell_type", obs_columns=())
"""


def kill_at(step: str, file: Path, uri: str) -> None:
    command = [sys.executable, "-c", KILLED, str(file), uri, step]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
def test_a_killed_append_is_removed_by_the_next_unless_it_was_committed(
    s3: S3Server, files: list[Path], local: list[Path]
) -> None:
    uri = upload(s3, local[1], "killed")
    before = contents(uri)
    for step in ("/X/raw", "/obs"):
        kill_at(step, files[2], uri)
        assert contents(uri) == before
        assert verify(uri)["unfinished"] and address.exists(f"{uri}.lock")
    kill_at("list", files[2], uri)  # begins by removing what the others left; ends between the commit and the list
    assert not verify(uri)["unfinished"]
    listed, there = objects.read_list(uri), address.list_files(uri)
    assert (listed.n_datasets, open_store(uri).n_listed) == (2, 2)  # type: ignore[attr-defined]
    assert contents(uri) == contents(local[2])
    lost = [n for n in there if n not in listed.files and re.search("(X/raw|obs)/__commits", n)]
    assert len(lost) == 2
    for name in lost:
        with without(s3, f"{uri}/{name}"), pytest.raises(ValueError, match="the ledger says"):
            open_store(uri)
    with pytest.raises(Stop), pytest.MonkeyPatch.context() as patch:
        writes(patch, stop_at_once)
        ingest.h5ad(make_fourth(files[0]), uri, "d", **OPTIONS)
    assert objects.read_list(uri).n_datasets == 3  # the next append, even one that fails, lists it
    for name in lost:
        with without(s3, f"{uri}/{name}"), pytest.raises(ValueError, match="missing, though the store's list has it"):
            open_store(uri)
    assert contents(uri) == contents(local[2])
    assert not address.exists(f"{uri}.lock")


def stop_at_once(uri: str, number: int) -> None:
    raise Stop(uri)


def make_fourth(beside: Path) -> Path:
    path = beside.with_name("d.h5ad")
    make_adata(9, GENES_B, n_obs=6).write_h5ad(path)
    return path


@contextmanager
def without(server: S3Server, uri: str, instead: bytes | None = None) -> Iterator[None]:
    """Delete an object, or put something in its place, and put it back at the end."""
    client, key = server.client(), uri.removeprefix(f"s3://{server.bucket}/")
    body = client.get_object(Bucket=server.bucket, Key=key)["Body"].read()
    if instead is None:
        client.delete_object(Bucket=server.bucket, Key=key)
    else:
        client.put_object(Bucket=server.bucket, Key=key, Body=instead)
    try:
        yield
    finally:
        client.put_object(Bucket=server.bucket, Key=key, Body=body)


@pytest.mark.slow
def test_a_killed_first_append_is_begun_anew(s3: S3Server, files: list[Path], local: list[Path]) -> None:
    uri = f"s3://{s3.bucket}/begun"
    kill_at("summary", files[0], uri)  # while the store is made
    assert objects.MARK in address.list_files(uri)
    with pytest.raises(FileNotFoundError, match="an ingest is making it, or was killed"):
        open_store(uri)
    ingest.h5ad(files[0], uri, "a", **OPTIONS)
    assert contents(uri) == contents(local[0])
    verify(uri)


def test_of_two_writers_the_second_is_refused(
    s3: S3Server, made: str, files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    lock = f"{made}.lock"
    with objects.writing(made):
        with pytest.raises(ValueError, match=rf"another process.*process {os.getpid()} on .*aws s3 rm {lock}"):
            ingest.h5ad(files[2], made, "c", **OPTIONS)
        assert open_store(made).n_obs == 42
    other = {"token": "x", "machine": "another", "host": "elsewhere", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = objects._machine()
    for holder, is_free in (
        (other, False), ({}, False), ({**other, "machine": here}, False), ({**other, "machine": here, "pid": dead.pid}, True),
        ({**other, "machine": here, "pid": os.getpid()}, True),
    ):  # fmt: skip
        client = s3.client()
        client.put_object(Bucket=s3.bucket, Key="made/store.lock", Body=json.dumps(holder).encode())
        if is_free:
            with objects.writing(made):
                pass
            assert not address.exists(lock)
            continue
        where = "elsewhere, since 2026-01-01" if holder else r"on \?"
        with (
            pytest.raises(ValueError, match=f"another process is writing to this store.*{where}"),
            objects.writing(made),
        ):
            pass
        assert address.exists(lock)
        client.delete_object(Bucket=s3.bucket, Key="made/store.lock")


def test_two_processes_at_once_one_of_them_writes(s3: S3Server, made: str) -> None:
    """Three processes that ask for the lock at the same moment: it is never held twice."""
    code = (
        "import sys, time\nfrom txfm_data.store import objects\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try:\n    with objects.writing(sys.argv[1]):\n        print('held', flush=True)\n        time.sleep(2)\n"
        "except ValueError as error:\n    print('refused' if 'another process' in str(error) else error)\n"
    )
    start = str(time.time() + 4)
    asking = [
        subprocess.Popen([sys.executable, "-c", code, made, start], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert sorted(process.communicate(timeout=60)[0].strip() for process in asking) == ["held", "refused", "refused"]


def test_new_columns_and_zarr_are_refused(s3: S3Server, made: str, files: list[Path], local: list[Path]) -> None:
    uri = upload(s3, local[0], "columns")
    before = contents(uri)
    with pytest.raises(ValueError, match=r"no columns \['guide'\].*--obs-columns"):
        ingest.h5ad(files[1], uri, "b", batch="batch", cell_type="cell_type")
    assert contents(uri) == before
    with pytest.raises(ValueError, match="Zarr store cannot be made.*--backend soma"):
        ingest.h5ad(files[0], f"s3://{s3.bucket}/zarr", "a", **OPTIONS, backend="zarr")
    assert not address.exists(f"s3://{s3.bucket}/zarr")
    s3.client().put_object(Bucket=s3.bucket, Key="azarr/zarr.json", Body=b"{}")
    for call in (open_store, lambda where: ingest.h5ad(files[0], where, "a", **OPTIONS)):
        with pytest.raises(ValueError, match="a Zarr store is read from a local disk"):
            call(f"s3://{s3.bucket}/azarr")


def test_a_lost_or_changed_object_is_noticed_when_it_is_opened(s3: S3Server, made: str, files: list[Path]) -> None:
    names = list(address.list_files(made))
    lost = [
        next(n for n in names if re.search(what, n))
        for what in (
            "X/raw/__commits",
            "X/raw/__fragments.*a0",
            "obs/__commits",
            "txfm_ledger/__commits",
            "__tiledb_group",
        )
    ]
    for name in lost[:4]:
        missing = re.escape(name) + ".*missing, though"
        with without(s3, f"{made}/{name}"), pytest.raises(ValueError, match=missing):
            open_store(made)
    with without(s3, f"{made}/{lost[1]}", b"cut"), pytest.raises(ValueError, match="3 bytes, the store's list says"):
        open_store(made)
    with without(s3, f"{made}/{lost[0]}"), pytest.raises(ValueError, match="missing, though"):
        ingest.h5ad(files[2], made, "c", **OPTIONS)
    with without(s3, f"{made}/{objects.LIST}"), pytest.raises(ValueError, match="nothing says which objects"):
        open_store(made)
    with without(s3, f"{made}/{objects.LIST}", b'{"list": "{}", "sha256": "0"}'):
        with pytest.raises(ValueError, match="not a readable list of objects"):
            open_store(made)
    assert open_store(made).n_obs == 42
    assert not address.exists(f"{made}.lock")


def test_a_clock_behind_is_noticed(s3: S3Server, made: str, files: list[Path]) -> None:
    ms = time.time_ns() // 1_000_000 + 60_000
    key = f"made/store/census_info/datasets/__commits/__{ms}_{ms}_{'0' * 32}_22.con"
    client = s3.client()
    client.put_object(Bucket=s3.bucket, Key=key, Body=b"")
    try:
        with pytest.raises(ValueError, match=r"\d+ s in the future of this machine's clock"):
            objects.wait_for_clock(made)
    finally:
        client.delete_object(Bucket=s3.bucket, Key=key)
    objects.wait_for_clock(made)


BAD = [
    ({"AWS_SECRET_ACCESS_KEY": WRONG_SECRET}, PermissionError, "secret key does not belong to the access key"),
    ({"AWS_ACCESS_KEY_ID": "AKIDUNKNOWN000000000"}, PermissionError, "does not know the access key"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ConnectionError, "does not answer"),
]


@pytest.mark.parametrize("variables, kind, message", BAD, ids=["secret", "key", "server"])
def test_what_is_wrong_with_the_access_is_said_within_seconds(
    s3: S3Server,
    made: str,
    files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    kind: Any,
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    for call in (open_store, lambda uri: ingest.h5ad(files[2], uri, "c", **OPTIONS)):
        with pytest.raises(kind, match=f"{made}.*{message}") as caught:
            call(made)
        assert not [secret for secret in (SECRET_KEY, WRONG_SECRET) if secret in repr(caught.getrepr())]
    assert time.monotonic() - start < 60


def test_addresses_that_are_no_stores(s3: S3Server, files: list[Path]) -> None:
    start = time.monotonic()
    for call in (open_store, lambda uri: ingest.h5ad(files[0], uri, "a", **OPTIONS)):
        with pytest.raises(FileNotFoundError, match="no such bucket"):
            call("s3://nobucket/store")
        s3.client().put_object(Bucket=s3.bucket, Key="other/readme", Body=b"x")
        with pytest.raises(ValueError, match="not a TxFM store"):
            call(f"s3://{s3.bucket}/other")
        for wrong in (
            f"s3://{s3.bucket}",
            "s3://",
            f"s3://{s3.bucket}/x?versionId=1",
            "https://host/x",
            "gs://b/x",
            "s3://u:p@b/x",
        ):
            with pytest.raises(ValueError, match="not the address of a store"):
                call(wrong)
    with pytest.raises(FileNotFoundError, match="no store there; make one with: txfm ingest"):
        open_store(f"s3://{s3.bucket}/nothing")
    assert list(address.list_files(f"s3://{s3.bucket}/other")) == ["readme"]
    assert time.monotonic() - start < 30


def test_no_secret_is_written_or_said(
    s3: S3Server, files: list[Path], made: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG, "txfm_data")
    signature, password = "5ig4atureThatNobodyMaySee", "passw0rdThatNobodyMaySee"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"{s3.endpoint}/{s3.public_bucket}/a.h5ad?X-Amz-Signature={signature}&X-Amz-Credential={ACCESS_KEY}"
    s3.client().put_object(Bucket=s3.public_bucket, Key="a.h5ad", Body=plain(tmp_path).read_bytes())
    uri = f"s3://{s3.bucket}/secrets"
    said: list[str] = []
    named = ["--dataset", "a", "--values", "counts", "--batch", "batch", "--cell-type", "cell_type", "--json"]

    def run(*arguments: str) -> int:
        code = cli.main(list(arguments))
        said.extend(capfd.readouterr())
        return code

    assert run("ingest", "h5ad", url, "--store", uri, *named) == 0, said
    assert run("ingest", "h5ad", url, "--store", uri, *named) == 1  # there already
    assert run("ingest", "h5ad", f"s3://user:{password}@{s3.bucket}/in/a.h5ad", "--store", uri, *named) == 1
    for bad in (f"s3://user:{password}@{s3.bucket}/x", f"s3://{s3.bucket}/x?X-Amz-Signature={signature}"):
        for verb in (["info", bad], ["verify", bad], ["ingest", "h5ad", str(files[0]), "--store", bad, *named]):
            assert run(*verb) == 1
    for variables, _, _ in BAD[:2]:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert run("info", made) == 1
            assert run("ingest", "h5ad", str(files[2]), "--store", uri, *named) == 1
    store = open_store(uri)
    said += [repr(store.datasets), str(store.obs().to_pylist()), caplog.text]
    client = s3.client()
    said += [
        client.get_object(Bucket=s3.bucket, Key=f"secrets/{name}")["Body"].read().decode("latin-1")
        for name in address.list_files(uri)
    ]
    text = "\n".join([*said, *address.list_files(uri)])
    assert store.datasets[0].source == "a.h5ad" and "a.h5ad" in text
    for secret in (signature, password, SECRET_KEY, WRONG_SECRET):
        assert secret not in text
