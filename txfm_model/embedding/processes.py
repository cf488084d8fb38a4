"""The processes that a launcher started for work that needs no gradients: who has which part, and who failed.

They agree through the launcher's key-value store alone, without a process group: nothing times out while one process
computes longer than the others, and waiting can be interrupted.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

_POLL_S = 0.05
_FAREWELL_S = 10.0
_CONNECT = timedelta(minutes=10)


class Processes:
    """This process among those that were launched together; alone if there was no launcher. Each serves one piece of work.

    A program that does several makes one for each, in the same order on every process.

    Attributes
    ----------
    rank, size : of this process and number of them.  local_rank : on this machine.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.rank, self.size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(environ.get("LOCAL_RANK", "0"))
        self._store: Any = None
        if self.size > 1:
            from torch.distributed import PrefixStore
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(iter(rendezvous("env://", self.rank, self.size, timeout=_CONNECT)))
            # What an earlier one of these processes left in the store, such as its folder, is not of this one
            number = PrefixStore("txfm", store).add(f"opened/{self.rank}", 1)
            self._store = PrefixStore(f"txfm/{number}", store)

    def device(self, asked: str | None) -> torch.device:
        """The device asked for; by default this process' own GPU where there is one."""
        if asked is not None:
            return torch.device(asked)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def publish(self, key: str, text: str = "1") -> None:
        """Tell the other processes."""
        if self._store is not None:
            self._store.set(key, text)

    def wait_for(self, key: str) -> str:
        """Wait until a process has published `key`; RuntimeError if one has failed meanwhile."""
        while not self._store.check([key]):
            self.raise_if_failed()
            time.sleep(_POLL_S)
        return str(self._store.get(key).decode())

    def raise_if_failed(self) -> None:
        """Stop if another process has.

        Raises
        ------
        ChildProcessError
            With what that process said.
        """
        if self._store is not None and self._store.check(["failed"]):
            raise ChildProcessError(f"stopped, for another process failed: {self._store.get('failed').decode()}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let the others know if this process fails within."""
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError, OSError):  # the store may be gone with its launcher
                if self._store is not None and not self._store.check(["failed"]):
                    self.publish("failed", f"process {self.rank}: {error or type(error).__name__}")
            raise

    def part(self, key: str) -> None:
        """Say goodbye: the first process, which may hold the store, leaves last, but not later than ten seconds."""
        if self._store is None:
            return
        self.publish(f"{key}/{self.rank}")
        stop = time.monotonic() + _FAREWELL_S
        everyone = [f"{key}/{rank}" for rank in range(self.size)]
        while self.rank == 0 and time.monotonic() < stop and not self._store.check(everyone):
            time.sleep(_POLL_S)
