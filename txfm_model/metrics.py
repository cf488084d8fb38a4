"""What a run reports: one JSON line and one TensorBoard point for each measurement."""

import json
import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

Value = float | None | Mapping[str, float | None]
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsWriter:
    """Writes measurements to `metrics.jsonl` and, where tensorboard is installed, to files in `tensorboard/`.

    Opening it starts both anew, or with `after_step` keeps what a run had measured up to that step, which it goes on from.
    """

    def __init__(self, folder: Path, after_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        kept = [] if after_step is None else _lines_up_to(self.path, after_step)
        staging = self.path.with_name(f".{METRICS}.partial")
        staging.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(staging, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = _open_tensorboard(folder / TENSORBOARD, after_step)

    def write(self, split: str, step: int, epoch: float, values: Mapping[str, Value]) -> None:
        """Write one line: split, step, epoch and the values (None where there was nothing to measure), or values by name.

        A disk that refuses it costs the line, not the run.
        """
        line = {"split": split, "step": step, "epoch": epoch, **values}
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:  # a full disk, say: the file holds in memory what it could not write
            logger.error("%s: step %d was not written, and goes with a later one: %s", self.path, step, error)
        self._write_events(split, step, values)

    def _write_events(self, split: str, step: int, values: Mapping[str, Value]) -> None:
        if self._events is None:
            return
        try:
            for name, value in values.items():
                for part, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                    if number is not None:
                        self._events.add_scalar(f"{split}/{name}{'/' if part else ''}{part}", number, step)
            self._events.flush()
        except OSError as error:  # its thread has ended and takes nothing more
            logger.error("TensorBoard gets nothing more from step %d on; %s has it all: %s", step, METRICS, error)
            self._events = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError as failed:
            logger.error("%s: its last lines were not written: %s", self.path, failed)
        if self._events is not None:
            self._events.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Lines of a run up to a step. What is no whole line, as a killed run may leave as its last, is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            logger.warning("%s: a line was cut off and is dropped: %.60s", path, line)
    return kept


def _open_tensorboard(folder: Path, after_step: int | None) -> "SummaryWriter | None":
    if find_spec("tensorboard") is None:
        logger.info("tensorboard is not installed; metrics go to %s only", METRICS)
        return None
    from torch.utils.tensorboard import SummaryWriter

    if after_step is not None:
        return SummaryWriter(str(folder), purge_step=after_step + 1)
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    return SummaryWriter(str(folder))
