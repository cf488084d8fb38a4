"""What a run reports: one JSON line and one TensorBoard point for each measurement."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsWriter:
    """Writes measurements to `metrics.jsonl` and, where tensorboard is installed, to files in `tensorboard/`.

    Opening it starts both anew: a folder with a finished run is refused before.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        self._file = self.path.open("w", encoding="utf-8")
        self._events = _open_tensorboard(folder / TENSORBOARD)

    def write(self, split: str, step: int, epoch: float, values: dict[str, float | None]) -> None:
        """Write one line: split, step, epoch and the values (None where there was nothing to measure)."""
        line = {"split": split, "step": step, "epoch": epoch, **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(f"{split}/{name}", value, step)
            self._events.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _open_tensorboard(folder: Path) -> "SummaryWriter | None":
    if find_spec("tensorboard") is None:
        logger.info("tensorboard is not installed; metrics go to %s only", METRICS)
        return None
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    return SummaryWriter(str(folder))
