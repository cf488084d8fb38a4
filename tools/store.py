"""Convert a store to the other backend, append one to another, or tidy its fragments."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_kinds, run_verb


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Write a store anew: with the other backend, another type of values, or some of its datasets."""

    source: str
    """The store to read."""
    target: str
    """The store to make; must not exist. A run that was stopped is continued: see `txfm store append`."""
    to: Literal["soma", "zarr"] | None = None
    """Backend of the new store. Default: the one that the source has not, or the same if --dtype is given."""
    dtype: Literal["uint32", "float64"] | None = None
    """Type of its values: float64 can hold expected counts that are not whole. Default: the source's."""
    datasets: tuple[str, ...] = ()
    """Names of the datasets to copy. Default: all."""


@dataclass(frozen=True, kw_only=True)
class AppendOptions:
    """Append datasets of one store to another, each all or nothing; those that are there already stay as they are."""

    source: str
    """The store to read."""
    target: str
    """The store to append to."""
    datasets: tuple[str, ...] = ()
    """Names of the datasets to copy. Default: all."""


@dataclass(frozen=True, kw_only=True)
class ConsolidateOptions:
    """Merge the small metadata files of a SOMA store's many fragments and remove what is superseded; readers open it faster."""

    store: str
    """Folder of the store."""


def run_convert(options: ConvertOptions, terminal: Terminal) -> dict[str, Any]:
    """Copy into a new store."""
    from txfm_data.store import opening
    from txfm_data.store.convert import copy_datasets

    if opening.exists(options.target):
        raise FileExistsError(f"{options.target}: exists already; name a free path, or use: txfm store append")
    to = options.to or (opening.open_store(options.source).backend if options.dtype else None)
    return copy_datasets(
        options.source, options.target, datasets=options.datasets, backend=to, dtype=options.dtype,
        progress=terminal.progress("copying", "samples"),
    )  # fmt: skip


def run_append(options: AppendOptions, terminal: Terminal) -> dict[str, Any]:
    """Copy into a store that is there."""
    from txfm_data.store import opening
    from txfm_data.store.convert import copy_datasets

    opening.open_store(options.target)
    progress = terminal.progress("copying", "samples")
    return copy_datasets(options.source, options.target, datasets=options.datasets, progress=progress)


def run_consolidate(options: ConsolidateOptions, terminal: Terminal) -> dict[str, Any]:
    """Consolidate and vacuum."""
    from txfm_data.store.consolidate import consolidate

    return consolidate(options.store, progress=terminal.progress("consolidating", "arrays"))


def summary_copy(result: dict[str, Any]) -> str:
    """What was copied, and what the target holds."""
    there = f"; already there: {', '.join(result['there_already'])}" if result["there_already"] else ""
    return (
        f"copied {', '.join(result['copied']) or 'nothing'}{there}\n"
        f"store: {result['target']} ({result['backend']}, {result['n_obs']:,} samples, {result['n_vars']:,} genes)"
    )


def summary_consolidate(result: dict[str, Any]) -> str:
    """Files before and after."""
    return (
        f"{result['files_before']:,} files became {result['files_after']:,}, {result['bytes_before']:,} bytes "
        f"{result['bytes_after']:,}\nstore: {result['store']}"
    )


def main_convert(argv: Sequence[str] | None = None) -> int:
    """Write a store anew with the other backend, another type of values, or some of its datasets."""
    return run_verb("store convert", ConvertOptions, run_convert, summary_copy, argv, positionals=("source", "target"))


def main_append(argv: Sequence[str] | None = None) -> int:
    """Append datasets of one store to another."""
    return run_verb("store append", AppendOptions, run_append, summary_copy, argv, positionals=("source", "target"))


def main_consolidate(argv: Sequence[str] | None = None) -> int:
    """Merge the fragments' metadata of a SOMA store and vacuum it."""
    return run_verb(
        "store consolidate", ConsolidateOptions, run_consolidate, summary_consolidate, argv, positionals=("store",)
    )


KINDS = {"convert": main_convert, "append": main_append, "consolidate": main_consolidate}


def main(argv: Sequence[str] | None = None) -> int:
    """Do one thing to a store."""
    return run_kinds("store", KINDS, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
