"""A run that is told to stop: which signals, how all processes learn of it at the same step, what the verb exits with."""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
"""Exit code of a run that was told to stop and has left a checkpoint to go on from (EX_TEMPFAIL of sysexits.h)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run was told to stop by a signal, and did.

    step : optimizer steps done.  checkpoint : folder to resume from, None where none could be written.
    """

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        self.step = step
        self.checkpoint = checkpoint
        where = f"go on with --resume auto from {checkpoint}" if checkpoint is not None else "there is no checkpoint"
        super().__init__(f"stopped by a signal after step {step}; {where}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step, self.checkpoint)


class StopSignals:
    """Within it, SIGTERM and SIGUSR1 only set a flag, however often they come; the handlers before are put back at the end.

    Handlers are set in the main thread alone, as Python asks for. On several processes (torch.distributed is
    initialised), every process must open it, close it and call `agree` at the same steps.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._agreed = False

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # On the CPU: a flag must not wait for the device, and NCCL would order it after the kernels
            self._group = dist.new_group(backend="gloo")
        return self

    def agree(self, step: int) -> bool:
        """Whether the run is to stop after `step`: the same answer on every process at the same step, and True from then on.

        On one process the flag as it is. On several, what they said together at the call before: their
        answers travel while the device computes a step, so that nothing waits.

        Raises
        ------
        RuntimeError
            If the processes are not at the same step.
        """
        if self._group is None:
            return self.is_set
        if self._agreed:
            return True
        self._agreed = self._finish()
        if not self._agreed:
            said = torch.tensor([int(self.is_set), step, -step], dtype=torch.int64)
            self._pending = dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group, async_op=True), said
        return self._agreed

    def _finish(self) -> bool:
        """Wait for what was asked last, which the others have been asked too."""
        if self._pending is None:
            return False
        (work, said), self._pending = self._pending, None
        work.wait()
        flag, most, least = int(said[0]), int(said[1]), -int(said[2])
        if most != least:
            raise RuntimeError(f"processes are at different steps, {least} and {most}; report this with the command")
        return flag > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None or issubclass(kind, Preempted):
                self._finish()  # all processes come here; after an error the others may not, and are not waited for
        finally:
            self._pending = self._group = None
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._before.clear()
