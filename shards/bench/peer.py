"""Another loader in a process and an interpreter of its own, driven an epoch at a time, so that rounds can alternate."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from shards.bench.rounds import Spent


class Peer:
    """A started process that answers a line of JSON with a line of JSON. A context manager.

    name : for messages.  command : program and arguments.

    Attributes
    ----------
    hello : what it said at the start.  nonzero : non-zero counts a sample in the last epoch.  samples : in that epoch.

    Raises
    ------
    ValueError
        If it does not start, or ends early; with the last it said.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self.samples, self.nonzero = 0, 0.0
        self._errors = tempfile.TemporaryFile("w+")
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
        except OSError as error:
            self._errors.close()
            raise ValueError(
                f"{name}: {command[0]} does not start: {error.strerror}; name a Python in which it runs"
            ) from error
        try:
            self.hello = self._answer()
        except ValueError:
            self._close()
            raise

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def epoch(self, number: int) -> Spent:
        """Have it run an epoch, and say what that took there."""
        assert self._process.stdin is not None  # noqa: S101  it was asked for
        try:
            self._process.stdin.write(json.dumps({"epoch": number}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone, and reading the answer says why
        found = self._answer()
        self.samples, self.nonzero = int(found["samples"]), found["nonzero"] / max(1, found["samples"])
        return Spent(self.samples, found["wall_s"], found["cpu_s"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101  it was asked for
        line = self._process.stdout.readline()
        if not line.startswith("{"):
            self._process.wait() if not line else self._process.kill()
            self._errors.seek(0)
            last = ([text for text in self._errors.read().splitlines() if text.strip()] or [line or "it said nothing"])[
                -1
            ]
            raise ValueError(f"{self._name} ended early: {last.strip()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
