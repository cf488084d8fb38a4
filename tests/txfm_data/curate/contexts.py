"""What a rule works with, made for tests: contexts in a folder, pools in this process whose results come in any order."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from txfm_data.curate.state import Context


class Reversed:
    """A pool that gives its results last first."""

    def run(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        return iter([work(task) for task in tasks][::-1])


class Serial:
    """A pool that gives its results in order."""

    def run(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        return map(work, tasks)


def context_of(folder: Path, **fields: Any) -> Context:
    """A context of rule 1 with seed 0, whose scratch is `folder` / "scratch" and extras `folder` / "extras"."""
    scratch, extras = folder / "scratch", folder / "extras"
    scratch.mkdir(exist_ok=True)
    extras.mkdir(exist_ok=True)
    given: dict[str, Any] = {"seed": 0, "number": 1, "pool": Serial(), "scratch": scratch, "extras": extras}
    return Context(**(given | fields))
