"""What a person sees of a running verb, on stderr: progress and short lines. stdout has the result."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from txfm_data.address import redact

LINE_INTERVAL_S = 5.0


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss, without the hours when there are none."""
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Terminal:
    """Where a verb says what it does: a bar for each task on a terminal, a line every few seconds in a log.

    Parameters
    ----------
    verb
        Name that starts each plain line.
    stream
        Where to write; stderr as it is at the time of writing if None.
    clock
        Seconds, monotonic; given by tests.
    is_quiet
        Write nothing (every process but the first of a distributed run).

    Attributes
    ----------
    stopped_by : exception type of a signal that arrived, or None; the next progress call raises it (again).
    """

    def __init__(
        self,
        verb: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_quiet: bool = False,
    ) -> None:
        self.verb = verb
        self.is_quiet = is_quiet
        self._stream = stream
        self._clock = clock
        self._bars: list[_Bar] = []
        self.stopped_by: type[BaseException] | None = None

    @property
    def stream(self) -> TextIO:
        """Where lines and bars go."""
        return sys.stderr if self._stream is None else self._stream

    def say(self, text: str) -> None:
        """Write one line, with secrets of URLs removed."""
        if not self.is_quiet:
            self._write(f"txfm {self.verb}: {redact(text)}")

    def progress(self, label: str, unit: str = "samples") -> Callable[[int, int], None]:
        """Return the callback that shows one task's progress; it is called as progress(done, total).

        label : what is being done ("reading").  unit : what is counted, in the plural ("samples", "steps").
        """
        show: Callable[[int, int], None]
        if self.is_quiet:
            show = _nothing
        elif self.stream.isatty():
            show = _Bar(label, unit, self.stream)
            self._bars.append(show)
        else:
            show = _Lines(f"txfm {self.verb}: {label}", unit, self._write, self._clock)

        def report(done: int, total: int) -> None:
            if self.stopped_by is not None:
                raise self.stopped_by
            show(done, total)

        return report

    def close(self) -> None:
        """Take bars that did not reach their end off the terminal, leaving what they showed."""
        for bar in self._bars:
            bar.close()

    def _write(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


def _nothing(done: int, total: int) -> None:
    """Show no progress."""


class _Bar:
    """A tqdm bar, made when the total is first known."""

    def __init__(self, label: str, unit: str, stream: TextIO) -> None:
        self.label, self.unit, self.stream = label, unit, stream
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            unit = f" {self.unit}"
            self.bar = tqdm(desc=self.label, total=total or None, unit=unit, file=self.stream, dynamic_ncols=True)
        self.bar.total = total or None
        self.bar.update(done - self.bar.n)
        if total and done >= total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class _Lines:
    """Plain lines for a log: at most one in `LINE_INTERVAL_S`, and always the last."""

    def __init__(self, label: str, unit: str, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self.label, self.unit, self.write, self.clock = label, unit, write, clock
        self.made_s = self.written_s = clock()
        self.first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = self.clock()
        if self.first is None:
            self.first = (now, done)
        is_last = total > 0 and done >= total
        if is_last or now - self.written_s >= LINE_INTERVAL_S:
            self.written_s = now
            self.write(self._line(now, done, total))

    def _line(self, now: float, done: int, total: int) -> str:
        # The first call may come from a resumed task: count the rate from there as soon as there is a second.
        first_s, first_done = self.first or (now, done)
        if done == first_done:
            first_s, first_done = self.made_s, 0
        rate = (done - first_done) / (now - first_s) if now > first_s else 0.0
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        of_total = f"/{total:,} {self.unit} ({done / total:.0%})" if total else f" {self.unit}"
        head = f"{self.label} {done:,}{of_total}"
        if rate <= 0:
            return head
        if not total or done >= total:
            return f"{head}, {speed} {self.unit}/s, {duration(now - self.made_s)} in all"
        return f"{head}, {speed} {self.unit}/s, {duration((total - done) / rate)} left"
