"""Independent blocks of work: in this process, in processes of this machine, or on the machines of a Dask cluster.

Dask is imported only when it is asked for. A block writes its own files and returns a small result; one process commits.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
_IN_FLIGHT_PER_WORKER = 2
_ANSWER_S = 20
"""How long a scheduler may take to answer."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where blocks are worked on.

    n : processes on this machine; 0 works in this process.
    scheduler : address of a Dask scheduler (``tcp://host:8786``), whose workers see the same files.
    memory : bytes that all of it may use.
    """

    n: int = 0
    scheduler: str | None = None
    memory: int = 2 * 1024**3

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"--workers must not be negative, got {self.n}")
        if self.n and self.scheduler:
            raise ValueError("--workers and --dask-scheduler are two ways to say where to work; choose one of them")

    @property
    def is_dask(self) -> bool:
        """Whether blocks leave this process."""
        return bool(self.n or self.scheduler)


class Pool(Protocol):
    """Something that works on blocks."""

    def run(self, work: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Results as they come, in no promised order. An exception of a block is raised here and stops the rest."""
        ...


class _Serial:
    def run(self, work: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        return map(work, tasks)


class _Dask:
    def __init__(self, client: Any, n_workers: int) -> None:
        self._client, self._in_flight = client, _IN_FLIGHT_PER_WORKER * n_workers

    def run(self, work: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        from distributed import as_completed

        shared = self._client.scatter(work, broadcast=True, hash=False)
        remaining = iter(tasks)

        def submit(task: T) -> Any:
            return self._client.submit(_call, shared, task, pure=False, retries=0)

        first = [submit(task) for task in islice(remaining, self._in_flight)]
        running = as_completed(first, loop=self._client.loop)
        try:
            for future in running:
                result: R = future.result()
                for task in islice(remaining, 1):
                    running.add(submit(task))
                yield result
        finally:
            self._client.cancel(list(running.futures), force=True)


def _call(work: Callable[[T], R], task: T) -> R:
    return work(task)


@contextmanager
def pool(workers: Workers) -> Iterator[Pool]:
    """A pool for as long as the block lasts.

    Raises
    ------
    ValueError
        If Dask is asked for and not installed, or the scheduler cannot be reached.
    """
    if not workers.is_dask:
        yield _Serial()
        return
    logging.getLogger("distributed").setLevel(logging.WARNING)  # each worker would tell of its start and its end
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ValueError("--workers and --dask-scheduler need Dask: pip install 'txfm[dask]'") from error
    if workers.scheduler:
        try:
            client = Client(workers.scheduler, timeout=_ANSWER_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{workers.scheduler}: no Dask scheduler answers there ({error}); check the address"
            ) from error
        with client:
            n_workers = len(client.scheduler_info(n_workers=-1)["workers"])
            if not n_workers:
                raise ValueError(
                    f"{workers.scheduler}: the scheduler has no workers; start some with: dask worker ADDRESS"
                )
            yield _Dask(client, n_workers)
        return
    with TemporaryDirectory(prefix="txfm-dask-") as folder:
        cluster = LocalCluster(
            n_workers=workers.n, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", local_directory=folder,
            memory_limit=0,  # blocks are sized to fit; a limit of Dask would kill a worker that is about to give memory back
        )  # fmt: skip
        with cluster, Client(cluster, set_as_default=False) as client:
            yield _Dask(client, workers.n)
