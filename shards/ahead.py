"""Makes items in a thread, a few ahead of the consumer."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator
from typing import TypeVar

Item = TypeVar("Item")
_AHEAD = 2


def ahead(
    produce: Callable[[], Generator[Item, None, None]], waited: Callable[[float], None]
) -> Generator[Item, None, None]:
    """Run `produce` in a thread, a few items ahead; its exception is raised here; stops when the consumer does."""
    ready: queue.Queue[Item | BaseException | None] = queue.Queue(_AHEAD)
    stop = threading.Event()

    def work() -> None:
        end: BaseException | None = None
        try:
            with contextlib.closing(produce()) as items:
                for item in items:
                    ready.put(item)
                    del item  # else its memory is taken until the next one is there
                    if stop.is_set():
                        return
        except BaseException as error:  # noqa: BLE001  handed to the consumer, who raises it
            end = error
        ready.put(end)

    thread = threading.Thread(target=work, name="txfm-stream", daemon=True)
    thread.start()
    try:
        while True:
            since = time.perf_counter()
            item = ready.get()
            waited(time.perf_counter() - since)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            del item
    finally:
        stop.set()
        while thread.is_alive():  # it may wait for room to put what nobody takes any more
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.02)
        thread.join()
