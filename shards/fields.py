"""Values of a JSON document that others wrote, each taken only if it has the type and the range it must have."""

import json
import re
from collections.abc import Collection
from typing import Any

SHA256 = re.compile(r"[0-9a-f]{64}")


def parse_json(data: bytes) -> Any:
    """Parse a JSON document: UTF-8, no key twice in one object, no NaN, no infinity.

    Raises
    ------
    ValueError
        Says where it stops being that.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands twice among {shown([key for key, _ in pairs])}")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def shown(value: Any) -> str:
    """A value for a message, cut to a line."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write out large ones
    text = repr(value[:5] if isinstance(value, list) else value[:61] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def integer(value: Any, what: str, low: int, high: int) -> int:
    """Return an integer from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {shown(value)}, expected an integer from {low} to {high}")
    return value


def number(value: Any, what: str, low: float, high: float, *, above: bool = False) -> float:
    """Return a number from `low` (or `above` it) to `high`."""
    if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
        raise ValueError(
            f"{what} is {shown(value)}, expected a number {'above' if above else 'from'} {low:g} to {high:g}"
        )
    return float(value)


def boolean(value: Any, what: str) -> bool:
    """Return true or false."""
    if type(value) is not bool:
        raise ValueError(f"{what} is {shown(value)}, expected true or false")
    return value


def text(value: Any, what: str) -> str:
    """Return a text that can be written as UTF-8."""
    if type(value) is not str:
        raise ValueError(f"{what} is {shown(value)}, expected a text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{what} holds half a character, which cannot be written as UTF-8")
    return value


def one_of(value: Any, what: str, known: Collection[str]) -> str:
    """Return one of the known texts."""
    if type(value) is not str or value not in known:
        raise ValueError(f"{what} is {shown(value)}, expected one of {sorted(known)}")
    return value


def sha256(value: Any, what: str) -> str:
    """Return a sha256 as 64 hexadecimal digits."""
    if type(value) is not str or SHA256.fullmatch(value) is None:
        raise ValueError(f"{what} is {shown(value)}, expected the 64 digits of a sha256")
    return value


def mapping(value: Any, what: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Return an object; with exactly these keys, if they are given."""
    if type(value) is not dict:
        raise ValueError(f"{what} is {shown(value)}, expected an object")
    if keys is not None and value.keys() != set(keys):
        missing, extra = sorted(set(keys) - value.keys()), sorted(value.keys() - set(keys))
        raise ValueError(f"{what} lacks the keys {shown(missing)} and has {shown(extra)} too many")
    for key in value if keys is None else ():
        text(key, f"a key of {what}")
    return value


def sequence(value: Any, what: str) -> list[Any]:
    """Return a list."""
    if type(value) is not list:
        raise ValueError(f"{what} is {shown(value)}, expected a list")
    return value
