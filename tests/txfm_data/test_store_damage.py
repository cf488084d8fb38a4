"""Damage to every single file of a store, in both backends: it is found, named, and never read as other numbers."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiledbsoma

from tests.txfm_data.stores import BACKENDS, append, contents, write_datasets
from txfm_data.store import files, layout
from txfm_data.store.opening import open_store
from txfm_data.store.verify import verify

NAMES = ("third", "second")


@pytest.fixture(scope="module", autouse=True)
def without_fsync():
    """What waits for the disk guards against power cuts, which no test here stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """One store of two datasets for each backend. Each test leaves them as they were."""
    folder = tmp_path_factory.mktemp("damage")
    sources = write_datasets(folder)
    for backend in BACKENDS:
        for name in NAMES:
            append(sources[name], folder / backend, name, backend=backend)
    return {backend: folder / backend for backend in BACKENDS}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture
def path(built, backend) -> Path:
    return built[backend]


@pytest.fixture(scope="module")
def sound(built) -> dict[str, dict[str, Any]]:
    """What the sound stores say."""
    for path in built.values():
        assert verify(path)["n_obs"] == 53
    return {backend: contents(open_store(path)) for backend, path in built.items()}


def listed(path: Path) -> list[Path]:
    """All files but the list of them."""
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != files.LIST)


def bulk(path: Path) -> list[Path]:
    """Files that grow with the data, which are too large to be hashed when a real store is opened."""
    return [
        p
        for p in listed(path)
        if (p.suffix == ".tdb" and p.parent.parent.name == "__fragments") or "c" in p.parts[-3:-1]
    ]


def bulk_of_counts(path: Path) -> list[Path]:
    return [p for p in bulk(path) if "X" in p.relative_to(path).parts and p.name != "__fragment_metadata.tdb"]


def flip(data: bytes, seed: int) -> bytes:
    """One bit turned, anywhere."""
    rng = np.random.default_rng(seed)
    out = bytearray(data)
    out[rng.integers(len(out))] ^= 1 << int(rng.integers(8))
    return bytes(out)


DAMAGE: dict[str, Callable[[bytes, int], bytes | None]] = {
    "flipped bit": flip,
    "a byte short": lambda data, seed: data[:-1],
    "half": lambda data, seed: data[: len(data) // 2],
    "a byte more": lambda data, seed: data + b"\0",
    "missing": lambda data, seed: None,
}


class damaged:
    """A file with other bytes, or none, within the block; as it was afterwards."""

    def __init__(self, file: Path, data: bytes | None) -> None:
        self._file, self._data, self._sound = file, data, file.read_bytes()

    def __enter__(self) -> None:
        if self._data is None:
            self._file.unlink()
        else:
            self._file.write_bytes(self._data)

    def __exit__(self, *error: object) -> None:
        self._file.write_bytes(self._sound)


def read_all(path: Path) -> dict[str, Any] | Exception:
    """What a reader gets."""
    try:
        return contents(open_store(path))
    except (ValueError, OSError) as error:
        return error


def cases(path: Path, kind: str) -> Iterator[tuple[Path, bytes | None]]:
    for seed, file in enumerate(listed(path)):
        data = file.read_bytes()
        if data or kind in ("missing", "a byte more"):
            yield file, DAMAGE[kind](data, seed)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_is_found_and_named(path, sound, kind):
    n = 0
    for file, data in cases(path, kind):
        with damaged(file, data):
            with pytest.raises(ValueError) as found:
                verify(path)
            assert str(file.relative_to(path)) in str(found.value), file
            read = read_all(path)
            assert isinstance(read, ValueError) and str(file.relative_to(path)) in str(read), file
        n += 1
    assert n >= 50
    verify(path)


def test_a_flip_in_a_file_too_large_to_hash_is_found_while_reading(path, backend, sound, monkeypatch):
    """Or it lies where no number that was read depends on it. The files are those of a small store, taken for large ones."""
    monkeypatch.setattr(files, "_SMALL", 0)
    n_found = n = 0
    for number, file in enumerate(bulk(path)[:: 4 if backend == "soma" else 1]):
        if file.name == "__fragment_metadata.tdb":
            continue  # some kilobytes for a fragment of any size: always hashed
        with damaged(file, flip(file.read_bytes(), number)):
            read = read_all(path)
            assert isinstance(read, Exception) or read == sound[backend], file
            with pytest.raises(ValueError, match="its sha256 is not that of the store's list"):
                verify(path)
        n, n_found = n + 1, n_found + isinstance(read, Exception)
    assert n >= 20 and n_found > 0.4 * n


def test_a_flip_in_the_counts_is_found_though_the_list_was_made_to_match(path, backend, sound):
    """As by a program that writes the list anew over damage: TileDB's SHA-256 and Zarr's CRC-32C are left."""
    before = (path / files.LIST).read_bytes()
    chosen = bulk_of_counts(path)
    assert len(chosen) >= (6 if backend == "soma" else 3)
    for number, file in enumerate(chosen):
        for seed in range(2):
            with damaged(file, flip(file.read_bytes(), 10 * number + seed)):
                files.write_list(path)
                files.verify_list(path)
                read = read_all(path)
                assert isinstance(read, Exception) or read == sound[backend], file
                if isinstance(read, Exception):
                    with pytest.raises(ValueError):
                        verify(path)
            (path / files.LIST).write_bytes(before)
    for file in chosen:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        with damaged(file, bytes(data)):
            files.write_list(path)
            assert isinstance(read_all(path), Exception), file
        (path / files.LIST).write_bytes(before)
    verify(path)


def test_lost_rows_are_found_though_the_list_was_made_to_match(built, tmp_path):
    """TileDB reads an array whose commit was lost, or whose cells were deleted, as if they had never been."""
    path = shutil.copytree(built["soma"], tmp_path / "store")
    with tiledbsoma.open(str(path / layout.RAW), "d") as matrix:
        matrix.delete_cells((slice(3, 3),))
    with pytest.raises(ValueError, match="not in the store's list of files"):
        open_store(path)
    files.write_list(path)
    with pytest.raises(ValueError, match="dataset 'third': non-zero counts: the ledger says"):
        verify(path)
    other = shutil.copytree(built["soma"], tmp_path / "other")
    for array in (layout.RAW, layout.OBS):
        for commit in sorted((other / array / "__commits").iterdir()):
            data = commit.read_bytes()
            commit.unlink()
            files.write_list(other)
            with pytest.raises(ValueError):
                verify(other)
            commit.write_bytes(data)
    files.write_list(other)
    verify(other)


@pytest.mark.parametrize("name", ["foreign.txt", "obs_copy/c/0", ".hidden"])
def test_a_foreign_file_is_refused_and_named(path, name):
    file = path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x")
    try:
        for use in (open_store, verify):
            with pytest.raises(
                ValueError, match=rf"{name}: not in the store's list of files \(1 such\); another program"
            ):
                use(path)
    finally:
        shutil.rmtree(path / "obs_copy", ignore_errors=True)
        file.unlink(missing_ok=True)
    verify(path)


def test_what_a_killed_writing_of_the_list_leaves_does_no_harm(path):
    part = path / f"{files.LIST}.part"
    part.write_text("half a li")
    try:
        verify(path)
    finally:
        part.unlink()


def test_a_damaged_list_is_refused(path, sound):
    file = path / files.LIST
    data = file.read_bytes()
    for seed in range(60):
        with damaged(file, flip(data, seed)), pytest.raises(ValueError, match=files.LIST.replace(".", r"\.")):
            open_store(path)
    for cut in (0, 1, 100, len(data) // 2, len(data) - 1):
        with damaged(file, data[:cut]):
            for use in (open_store, verify):
                with pytest.raises(ValueError, match=rf"{files.LIST}: not a readable list of files.*restore the store"):
                    use(path)
    with damaged(file, None):
        for use in (open_store, verify):
            with pytest.raises(ValueError, match=rf"{files.LIST}: missing, so nothing says which files belong"):
                use(path)
    verify(path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"version": 2, "files": {}}, "version 2, this release reads 1; upgrade"),
        ([], "not a readable list"), ({"files": {}}, "not a readable list"), ({"version": 1}, "not a readable list"),
        ({"version": 1, "files": {"a": 3}}, "not a readable list"), ({"version": 1, "files": {"a": [1]}}, "not a readable list"),
        ({"version": 1, "files": {"../../etc/passwd": [1, "x"]}}, "missing, though the store's list has it"),
    ],
)  # fmt: skip
def test_a_list_of_another_form_is_refused_though_its_checksum_fits(path, tree, message):
    text = json.dumps(tree)
    document = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "list": text}
    with damaged(path / files.LIST, json.dumps(document).encode()):
        for use in (open_store, verify):
            with pytest.raises(ValueError, match=message):
                use(path)


def test_an_append_to_a_damaged_store_is_refused_and_changes_nothing(path, built, backend):
    """So damage is never linked into a new list that calls it sound."""
    source = path.parent / "first.h5ad"
    for file in (listed(path)[0], listed(path)[-1]):
        with damaged(file, flip(file.read_bytes() or b"x", 5) if file.stat().st_size else b"x"):
            with pytest.raises(ValueError, match="restore the store|not a TxFM store"):
                append(source, path, "first")
    assert verify(path)["n_obs"] == 53
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_large_file_that_was_damaged_unseen_keeps_its_old_hash_through_an_append(
    built, backend, tmp_path, monkeypatch
):
    """An append does not read what it links; the next verify still finds the damage."""
    path = shutil.copytree(built[backend], tmp_path / "store")
    monkeypatch.setattr(files, "_SMALL", 0)
    file = bulk_of_counts(path)[0]
    file.write_bytes(flip(file.read_bytes(), 3))
    try:
        append(built[backend].parent / "first.h5ad", path, "first")
    except ValueError:
        assert backend == "zarr"  # it reads the last file of each array, to write it again
    with pytest.raises(ValueError, match="its sha256 is not that of the store's list"):
        verify(path)
