"""Configuration trees: frozen dataclasses from nested dicts and back, strictly.

What a YAML file, a checkpoint's JSON or a command line states becomes a typed tree here.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the part of an error that names the spellings near to `name`, or all if none is near."""
    known = list(known)
    plain = {key.replace("-", "_"): key for key in known}
    spelled = name.replace("-", "_")
    near = [spelled] if spelled in plain else difflib.get_close_matches(spelled, list(plain), n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(plain[key] for key in near) + "?"
    return "known: " + (", ".join(known) or "none")


def from_tree(cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """Build one frozen dataclass, nested ones included, from a dict as read from YAML or JSON.

    Parameters
    ----------
    cls
        A dataclass; its fields are int, float, bool, str, Path, Literal, tuple, a dataclass, or such or None.
    tree
        Values by field name. An int is taken for a float and a list for a tuple; nothing else is converted.
    where
        Dotted name of this node, for error messages.

    Raises
    ------
    ValueError
        For an unknown key (the near ones are named), for a missing required key, and from `__post_init__`.
    TypeError
        For a value of another type than its field's.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"{where or cls.__name__}: expected a mapping of fields, got {tree!r}")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(typing.cast("Any", cls)) if field.init]
    for key in tree:
        if key not in known:
            raise ValueError(f"{_join(where, str(key))}: unknown key; {did_you_mean(str(key), known)}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast("Any", cls)):
        if field.name in tree:
            values[field.name] = checked(tree[field.name], hints[field.name], _join(where, field.name))
        elif is_required(field) and field.init:
            raise ValueError(f"{_join(where, field.name)}: required, but not given")
    return cls(**values)


def to_tree(config: object) -> dict[str, Any]:
    """Return the dict that `from_tree` takes, with lists for tuples and text for paths."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_tree takes a dataclass instance, got {config!r}")
    names = [field.name for field in dataclasses.fields(config) if field.init]
    return {name: _plain(getattr(config, name)) for name in names}


def is_required(field: "dataclasses.Field[Any]") -> bool:
    """Whether a dataclass field has neither a default nor a factory of one."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def type_name(hint: Any) -> str:
    """Return how a person reads a type: `int`, `float | None`, `a|b` for a choice, `str ...` for many."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(arg) for arg in args)
    if origin is tuple:
        return " ".join("..." if arg is Ellipsis else type_name(arg) for arg in args)
    return "None" if hint is type(None) else str(getattr(hint, "__name__", hint))


def checked(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type `hint`, or raise TypeError that says what was expected at `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _checked_union(value, args, hint, where)
    if origin is tuple:
        return _checked_tuple(value, args, hint, where)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_tree(hint, value, where)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif hint in (int, bool, str, type(None)):
        if type(value) is hint:
            return value
    elif hint is not float and hint is not Path:
        raise TypeError(f"{where}: a configuration cannot hold the type {hint!r}")
    raise TypeError(f"{where}: expected {type_name(hint)}, got {value!r}")


def _checked_union(value: Any, args: tuple[Any, ...], hint: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    if len(options) == 1:
        try:
            return checked(value, options[0], where)
        except TypeError as err:
            if dataclasses.is_dataclass(options[0]):
                raise
            raise TypeError(f"{where}: expected {type_name(hint)}, got {value!r}") from err
    for option in options:
        try:
            return checked(value, option, where)
        except TypeError:
            continue
    raise TypeError(f"{where}: expected {type_name(hint)}, got {value!r}")


def _checked_tuple(value: Any, args: tuple[Any, ...], hint: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{where}: expected a list of {type_name(hint)}, got {value!r}")
    if args[-1] is Ellipsis:
        return tuple(checked(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise TypeError(f"{where}: expected {len(args)} values ({type_name(hint)}), got {value!r}")
    pairs = enumerate(zip(value, args, strict=True))
    return tuple(checked(item, arg, f"{where}[{i}]") for i, (item, arg) in pairs)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_tree(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
