"""What the steps of a build were made from, written down beside the results, and the safe replacement of a result."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STEPS = "steps.json"
_FORMAT, _VERSION = "txfm-corpus-build", 1
_OTHER_FILES = "other files"


class Steps:
    """What the steps of a build were made from: a small JSON file in its folder, replaced whole.

    Raises
    ------
    ValueError
        If the folder holds something else, or the build of another corpus.
    """

    def __init__(self, out: Path, corpus: str) -> None:
        self._path = out / STEPS
        if out.exists() and not self._path.is_file() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out}: holds something that is no build of a corpus; name another --out")
        out.mkdir(parents=True, exist_ok=True)
        self._steps: dict[str, Any] = {}
        if self._path.is_file():
            self._steps = self._read(corpus)
        else:
            self._write(corpus)
        self._corpus = corpus

    def _read(self, corpus: str) -> dict[str, Any]:
        try:
            tree = json.loads(self._path.read_text(encoding="utf-8"))
            if tree["format"] != _FORMAT or tree["version"] != _VERSION:
                raise ValueError(f"format {tree['format']!r}, version {tree['version']!r}")
            found, steps = str(tree["corpus"]), dict(tree["steps"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._path}: not the steps of a build ({error}); remove the folder, or name another --out"
            ) from error
        if found != corpus:
            raise ValueError(
                f"{self._path.parent}: holds the build of corpus {found!r}, not of {corpus!r}; name another --out"
            )
        return steps

    def _write(self, corpus: str) -> None:
        tree = {"format": _FORMAT, "version": _VERSION, "corpus": corpus, "steps": self._steps}
        part = self._path.with_name(f".{self._path.name}.tmp")
        with part.open("w", encoding="utf-8") as handle:
            handle.write(json.dumps(tree, indent=1, sort_keys=True) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, self._path)

    def inputs(self, step: str) -> Any:
        """What a step was last made from, or None."""
        return self._steps.get(step)

    def intend(self, step: str, inputs: Any) -> None:
        """Write down what a step is about to be made from."""
        self._steps[step] = inputs
        self._write(self._corpus)

    def took(self, dataset: str, problems: Mapping[str, str]) -> None:
        """Write down of a dataset that is about to be ingested which of its files are not the stated ones, by place."""
        known = {name: found for name, found in self._other_files().items() if name != dataset}
        after = known | ({dataset: dict(problems)} if problems else {})
        if after != self._other_files():
            self.intend(_OTHER_FILES, after)

    def other_files(self, datasets: Collection[str]) -> list[str]:
        """Files that some datasets were ingested from though they are not the stated ones: place and problem of each."""
        known = self._other_files()
        return [f"{place} {problem}" for name in datasets for place, problem in known.get(name, {}).items()]

    def _other_files(self) -> dict[str, dict[str, str]]:
        return dict(self.inputs(_OTHER_FILES) or {})

    def is_made(self, step: str, inputs: Mapping[str, Any], result: Path, mark: str, *, rebuild: bool) -> bool:
        """Whether a finished result of a step is there that was made from just this.

        result : folder that the step makes, whole.  mark : file in it once it is finished.

        Raises
        ------
        FileExistsError
            If the result was made from something else and `rebuild` is not asked for.
        """
        given, old = _plain(inputs), _old(result)
        if not (result / mark).is_file() and (old / mark).is_file() and self.inputs(_before(step)) == given:
            self._restore(step, result)  # its replacement was stopped
        if not (result / mark).is_file():
            return False
        before = self.inputs(step)
        if before == given:
            shutil.rmtree(old, ignore_errors=True)
            return True
        if not rebuild:
            raise FileExistsError(
                f"{result}: was made from something else ({difference(before, given)}); pass --rebuild to replace it, or name "
                "another --out"
            )
        return False

    @contextmanager
    def making(self, step: str, inputs: Mapping[str, Any], result: Path, mark: str) -> Iterator[None]:
        """Run a step: an older result is kept under another name until the new one is there, and comes back if that fails.

        A process that is killed meanwhile leaves the older result under its other name; `is_made` finds it there.
        """
        old = _old(result)
        if (result / mark).is_file():
            shutil.rmtree(old, ignore_errors=True)
            self.intend(_before(step), self.inputs(step))
            os.rename(result, old)
        self.intend(step, _plain(inputs))
        try:
            yield
        except BaseException:
            if (old / mark).is_file() and not (result / mark).is_file():
                self._restore(step, result)
            raise
        shutil.rmtree(old, ignore_errors=True)
        self._steps.pop(_before(step), None)
        self._write(self._corpus)

    def _restore(self, step: str, result: Path) -> None:
        shutil.rmtree(result, ignore_errors=True)
        self.intend(step, self.inputs(_before(step)))
        os.rename(_old(result), result)


def _before(step: str) -> str:
    return f"{step}, before"


def _old(result: Path) -> Path:
    return result.with_name(f".{result.name}.old")


def _plain(inputs: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(inputs))


def difference(before: Any, after: Any) -> str:
    """Which parts of what something was made from are other, as an error says it."""
    if not isinstance(before, Mapping):
        return "nothing was written down about it"
    return "other " + ", ".join(sorted(key for key in {*before, *after} if before.get(key) != after.get(key)))
