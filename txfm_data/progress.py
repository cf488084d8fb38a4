"""How long-running library calls report what they have done; the tools decide how it is shown."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called as progress(done, total), in samples unless the caller says otherwise."""


def ignore(done: int, total: int) -> None:
    """Report nowhere: the default of every call that takes a progress callback."""
