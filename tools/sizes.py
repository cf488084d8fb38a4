"""Sizes as people write them: ``256MiB``, ``1.5GB``."""

_UNITS = {
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``256MiB``; a plain number is bytes.

    Raises
    ------
    ValueError
        On anything else.
    """
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        return int(float(text.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is not a size; write a number and one of {list(_UNITS)}, such as 256MiB") from error
