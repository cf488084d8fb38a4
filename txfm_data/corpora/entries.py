"""The ingest of a dataset as a corpus file states it: options that its kind knows, with values that they can have."""

import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from txfm_data.config_tree import checked, did_you_mean, from_tree
from txfm_data.corpora.fields import check_relative
from txfm_data.ingest import kinds
from txfm_data.ingest.options import IngestOptions

CENSUS = "census"
KINDS = (*kinds.SOURCE_KINDS, CENSUS)
PATH_OPTIONS = ("path", "sample_table", "sample_sheet", "gene_map", "dataset_ids")
"""Options of an ingest that name a file or folder below that of the sources."""
_COMMON = tuple(field.name for field in fields(IngestOptions) if field.name not in ("workers", "backend"))
_OF_THE_CALL = ("store", "dry_run", "progress", "options")


def check_entry(entry: Mapping[str, Any], where: str) -> None:
    """Refuse what no ingest would take, before any file is looked at.

    entry : as `txfm ingest list` takes it, without the dataset's name, or with kind census the options of `txfm ingest census`.

    Raises
    ------
    ValueError, TypeError
        On an unknown kind or option (the near ones are named), one that is missing, or a value that it cannot have.
    """
    kind = entry.get("kind")
    for key in ("kind", *(() if kind == CENSUS else ("path", "values"))):
        if key not in entry:
            raise ValueError(f"{where}: ingest has no {key}; it is an entry as txfm ingest list takes it")
    if kind not in KINDS:
        raise ValueError(f"{where}: there is no kind {kind!r}; {did_you_mean(str(kind), KINDS)}")
    if "dataset" in entry:
        raise ValueError(f"{where}: ingest names the dataset {entry['dataset']!r}; leave it out, the name is above it")
    for key, value in entry.items():
        if not isinstance(value, str | int | float | bool | list | None):
            raise TypeError(f"{where}: ingest.{key} is the {type(value).__name__} {value}; put text in quotes")
        if key in PATH_OPTIONS and value is not None:
            check_relative(value, f"{where}: ingest.{key}")
    _check_options(str(kind), {k: v for k, v in entry.items() if k not in ("kind", "path")}, f"{where}: ingest")


def _check_options(kind: str, given: Mapping[str, Any], where: str) -> None:
    own = _own_options(kind)
    for name in given:
        if name not in own and name not in _COMMON:
            raise ValueError(f"{where}: kind {kind} has no option {name!r}; {did_you_mean(name, (*own, *_COMMON))}")
    for name, parameter in own.items():
        if parameter.default is inspect.Parameter.empty and given.get(name) is None:
            raise ValueError(f"{where}: kind {kind} needs {name}, {_expected(parameter)}")
        hint = parameter.annotation
        if given.get(name) is not None and name not in PATH_OPTIONS and typing.get_origin(hint) is not Mapping:
            checked(given[name], tuple[str, ...] if hint == Sequence[str] else hint, f"{where}.{name}")
    try:
        from_tree(IngestOptions, {k: v for k, v in given.items() if k in _COMMON and v is not None}, where)
    except ValueError as error:
        # What the options say of themselves names no file
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def _own_options(kind: str) -> dict[str, inspect.Parameter]:
    if kind != CENSUS:
        return kinds.source_options(kind)
    parameters = inspect.signature(kinds.census).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in _OF_THE_CALL}


def _expected(parameter: inspect.Parameter) -> str:
    return " or ".join(map(str, typing.get_args(parameter.annotation))) or "which has no default"
