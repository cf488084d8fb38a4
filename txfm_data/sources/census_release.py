"""Opening a release of the CELLxGENE Census, or anything shaped like it such as our own store."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import cellxgene_census
import numpy as np
import pyarrow as pa

from txfm_data import address
from txfm_data.address import redact
from txfm_data.obs_filter import nearest
from txfm_data.retry import with_retries
from txfm_data.store.layout import STEADY

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

BUFFER_BYTES = 32 * 1024**2
"""TileDB's buffer per column; with the Census's own default of 1 GiB a scan holds 3 GB."""
_SETTINGS = {**STEADY, "soma.init_buffer_bytes": BUFFER_BYTES, "py.init_buffer_bytes": BUFFER_BYTES}
RESOLVE_S = 15.0
"""Seconds to wait for the Census's list of releases."""
LIBRARY_SIZE = "raw_sum"
NEEDED_OBS = ("soma_joinid", "dataset_id", LIBRARY_SIZE, "nnz", "n_measured_vars")

_PROXY_REMEDY = (
    "set HTTPS_PROXY (or vfs.s3.proxy_host and vfs.s3.proxy_port) if you are behind a proxy, or download the release "
    "and name its folder with --uri"
)
READ_REMEDY = f"run the same command again, nothing was written; {_PROXY_REMEDY}"


@dataclass(frozen=True)
class Genes:
    """All genes of an organism in a release; a gene's row is its ``var.soma_joinid``.

    var : Arrow table, one row a gene, ascending.
    """

    var: pa.Table

    def texts(self, column: str) -> np.ndarray:
        """One column as text, "" where it is null: (V,) object."""
        return np.array(["" if value is None else str(value) for value in self.var[column].to_pylist()], object)


@dataclass(frozen=True)
class CensusRelease:
    """An open release of the Census.

    uri : resolved address, with which another process opens the same release.
    build_date, schema_version : as the release states them.
    organisms : names of the experiments it holds.
    is_public : whether it was opened by its version, so in the Census' own bucket.
    """

    uri: str
    build_date: str
    schema_version: str
    organisms: tuple[str, ...]
    census: Any = field(repr=False, compare=False)
    # May hold keys and passwords: never shown.
    tiledb_config: Mapping[str, Any] = field(repr=False, compare=False)
    is_public: bool = False
    _genes: dict[str, Genes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def where(self) -> str:
        """Address for messages."""
        return redact(self.uri)

    @property
    def is_ours(self) -> bool:
        """Whether it is a TxFM store, whose library sizes may count genes that it does not hold."""
        return "txfm_format" in self.census.metadata

    def organism(self, name: str) -> str:
        """Name of an organism as the release spells it; ``Homo sapiens`` is accepted for ``homo_sapiens``."""
        key = name.strip().lower().replace(" ", "_")
        if key not in self.organisms:
            near = nearest(key, self.organisms)
            hint = f" (near it: {near})" if near else ""
            raise ValueError(f"{self.where}: --organism {name!r} is not there{hint}; it holds {list(self.organisms)}")
        return key

    def experiment(self, organism: str) -> Any:
        """The SOMA experiment of an organism."""
        return self.census["census_data"][self.organism(organism)]

    def genes(self, organism: str) -> Genes:
        """All genes of an organism, read once."""
        key = self.organism(organism)
        if key not in self._genes:
            frame = self.experiment(key).ms["RNA"].var
            table = self.retrying(lambda: frame.read().concat(), f"{key} var").sort_by("soma_joinid")
            if not np.array_equal(table["soma_joinid"].to_numpy(), np.arange(len(table))):
                raise ValueError(
                    f"{self.where}: var of {key} is not numbered from 0 on; the copy is damaged, get it again"
                )
            self._genes[key] = Genes(table)
        return self._genes[key]

    def datasets(self) -> pa.Table:
        """The table of datasets; a dataset's ``soma_joinid`` is its row of the presence matrix."""
        frame = self.census["census_info"]["datasets"]
        return self.retrying(lambda: frame.read().concat(), "census_info/datasets")

    def retrying(self, work: Callable[[], _T], what: str) -> _T:
        """Do a read over transient faults; `what` is named in errors."""
        return with_retries(work, what=f"{self.where}: {what}", remedy=READ_REMEDY)

    def close(self) -> None:
        """Close all handles."""
        self.census.close()

    def __enter__(self) -> "CensusRelease":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- opening ---------------------------------------------------------------------------------------------------------


def open_census(
    version: str | None = None,
    uri: str | None = None,
    *,
    tiledb_config: Mapping[str, Any] | None = None,
) -> CensusRelease:
    """Open a release of the Census by its version, or a copy of it (or a TxFM store) by its address.

    version : build date such as ``2025-11-08``, or ``stable`` or ``latest``, which are resolved to a date once.
    uri : folder or address; wins over `version`, and needs no network if it is local.
    tiledb_config : TileDB's settings, such as ``vfs.s3.region``, ``vfs.s3.no_sign_request`` (default true, as the public
        Census needs), ``vfs.s3.proxy_host``. Without proxy settings, HTTPS_PROXY and HTTP_PROXY are honoured.

    Raises
    ------
    FileNotFoundError
        If there is nothing at the address.
    OSError
        If the network does not answer, within seconds.
    ValueError
        If neither is named, the version is unknown, or what is there is not shaped like the Census.
    """
    given = dict(tiledb_config or {})
    if uri is None:
        if version is None:
            raise ValueError("the Census: name a release with --version (such as stable), or a copy of it with --uri")
        build = _build_date(version)
        config = {**_SETTINGS, **_environment(given, is_public=True), **given}
        census = _open(f"the Census {build}", lambda: _within(
            RESOLVE_S, lambda: cellxgene_census.open_soma(census_version=build, tiledb_config=config)
        ))  # fmt: skip
        # The region belongs to the bucket of the release; opening by address again must name it.
        region = census.context.tiledb_config.get("vfs.s3.region")
        given = {**given, "vfs.s3.region": region} if region else given
        return replace(_release(census, census.uri, given, expected_build=build), is_public=True)
    return open_at(uri, given, is_public=False)


def open_at(uri: str, given: Mapping[str, Any], *, is_public: bool) -> CensusRelease:
    """Open what is at an address; `is_public` if that is the Census' own bucket, whatever storage the environment names."""
    if "://" not in uri:
        uri = str(Path(uri).expanduser().absolute())
    is_local = "://" not in uri or uri.startswith("file://")
    config = {**_SETTINGS, **({} if is_local else _environment(given, is_public=is_public)), **given}
    census = _open(uri, lambda: cellxgene_census.open_soma(uri=uri, tiledb_config=config), is_local=is_local)
    return replace(_release(census, uri, given), is_public=is_public)


def _open(what: str, work: Callable[[], Any], *, is_local: bool = False) -> Any:
    remedy = "name a folder or address that holds census_info and census_data"
    remedy = remedy if is_local else f"{remedy}; {_PROXY_REMEDY}"
    # Two tries: without a network the user should know within seconds.
    return with_retries(work, what=f"cannot open {redact(what)}", remedy=remedy, tries=2, first_wait_s=0.5)


def _within(seconds: float, work: Callable[[], _T]) -> _T:
    """Result of `work`, or TimeoutError: the Census client sets no timeout, and a silent firewall would hang it."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


def _build_date(version: str) -> str:
    """Build date of a version or alias, from the Census's list of releases."""
    what = f"--version {version}: cannot read the list of Census releases"

    def ask() -> str:
        return str(cellxgene_census.get_census_version_description(version)["release_build"])

    def known() -> list[str]:
        return sorted(cellxgene_census.get_census_version_directory())

    try:
        return with_retries(lambda: _within(RESOLVE_S, ask), what=what, remedy=_PROXY_REMEDY, tries=2, first_wait_s=0.5)
    except ValueError as error:
        names = with_retries(lambda: _within(RESOLVE_S, known), what=what, remedy=_PROXY_REMEDY, tries=2)
        raise ValueError(
            f"--version {version!r}: there is no such release; near it: {nearest(version, names)}, all: {names}"
        ) from error


def _environment(given: Mapping[str, Any], *, is_public: bool) -> dict[str, Any]:
    """TileDB's settings that the environment names, unless others are given; for the public Census proxy and certificates alone."""
    has_proxy = any(key.startswith("vfs.s3.proxy_") for key in given)
    found = address.tiledb_config()
    kept = ("vfs.s3.ca_",) if is_public else ("vfs.",)
    return {k: v for k, v in found.items() if (not has_proxy if k.startswith("vfs.s3.proxy_") else k.startswith(kept))}


def _release(census: Any, uri: str, config: Mapping[str, Any], expected_build: str | None = None) -> CensusRelease:
    where = redact(uri)
    try:
        return _checked_release(census, uri, where, config, expected_build)
    except BaseException:
        census.close()
        raise


def _checked_release(
    census: Any, uri: str, where: str, config: Mapping[str, Any], expected_build: str | None
) -> CensusRelease:
    missing = [part for part in ("census_info", "census_data") if part not in census]
    if not missing:
        missing = [f"census_info/{part}" for part in ("summary", "datasets") if part not in census["census_info"]]
    if missing:
        raise ValueError(
            f"{where}: a SOMA collection, but not shaped like the Census: has no {missing}, it holds {sorted(census)}; "
            "name the folder above census_info and census_data"
        )
    frame = census["census_info"]["summary"]
    table = with_retries(lambda: frame.read().concat(), what=f"{where}: census_info/summary", remedy=READ_REMEDY)
    summary = dict(zip(table["label"].to_pylist(), table["value"].to_pylist(), strict=True))
    lacks = [label for label in ("census_build_date", "census_schema_version") if label not in summary]
    if lacks:
        raise ValueError(
            f"{where}: census_info/summary has no {lacks}, it has {sorted(summary)}; the copy is incomplete"
        )
    build = str(summary["census_build_date"])
    if expected_build is not None and build != expected_build:
        _log.warning("%s: states build date %s, the list of releases %s", where, build, expected_build)
    return CensusRelease(
        uri, build, str(summary["census_schema_version"]), tuple(sorted(census["census_data"])), census, dict(config)
    )
