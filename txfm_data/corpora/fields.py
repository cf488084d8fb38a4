"""Values of a corpus file, checked for their type; every error says in which file and at which key."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from txfm_data.config_tree import did_you_mean


def mapping(tree: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Keys and values under a key, none if it is not there; TypeError if it is something else."""
    found = tree.get(key, {})
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise TypeError(f"{where}: {key} must hold keys and values, got {found!r}")
    return dict(found)


def text(tree: Mapping[str, Any], key: str, where: str) -> str:
    """Text under a key on one line, empty if it is not there; TypeError if it is something else."""
    found = tree.get(key, "")
    if not isinstance(found, str):
        raise TypeError(f"{where}: {key} must be text, got {found!r}; put it in quotes")
    return " ".join(found.split())


def texts(tree: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of texts under a key, empty if it is not there; TypeError if it is something else."""
    found = tree.get(key, [])
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise TypeError(f"{where}: {key} must be a list of texts, such as [first, second]; got {found!r}")
    return tuple(found)


def whole_number(tree: Mapping[str, Any], key: str, where: str) -> int | None:
    """A whole number of at least 1 under a key, None if it is not there; TypeError or ValueError if it is something else."""
    found = tree.get(key)
    if found is None:
        return None
    if type(found) is not int:
        raise TypeError(f"{where}: {key} must be a whole number, got {found!r}")
    if found < 1:
        raise ValueError(f"{where}: {key} must be at least 1, got {found}")
    return found


def check_known(tree: Mapping[Any, Any], keys: Sequence[str], where: str) -> None:
    """Refuse a key that is none of `keys`: ValueError that names the near ones."""
    for key in tree:
        if key not in keys:
            raise ValueError(f"{where}: unknown key {key!r}; {did_you_mean(str(key), keys)}")


def check_relative(path: Any, what: str) -> None:
    """Refuse a path that would leave the folder of sources, since a corpus file may come from somebody else: ValueError."""
    if not isinstance(path, str) or not path:
        raise ValueError(f"{what}: expected a path below the folder of sources, got {path!r}")
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{what}: {path!r} must lie below the folder of sources: neither absolute nor with ..")
