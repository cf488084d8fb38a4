"""The masked stream in a process of its own: its memory, its first batch, and how long a steady consumer waits for it.

Run as a file with one JSON argument; prints one JSON object. So nothing that another measurement has left counts.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_EVERY_S = 0.005


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to stream, and how.

    batch : samples of a global batch.  n_unmasked : genes shown.  threads : that read.  interval_s : what the consumer does
    with a batch takes so long.  n_paced : batches that it takes that slowly; it takes those that follow as they come.
    n_batches : to take in all; None for the whole epoch.
    """

    shards: str
    batch: int
    n_unmasked: int
    seed: int
    threads: int | None = None
    interval_s: float = 0.03
    n_paced: int = 200
    n_batches: int | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found.

    samples : streamed in all.  imports_bytes : anonymous memory once everything was imported.
    peak_bytes : most above that.  Both are None where there is no /proc.
    first_batch_s : seconds from before the corpus was opened to its first batch.
    waits_s : seconds that each of the paced batches was waited for, the first batch left out.
    """

    samples: int
    imports_bytes: int | None
    peak_bytes: int | None
    first_batch_s: float
    waits_s: tuple[float, ...]


def stream_afresh(request: Request) -> Found:
    """Stream one epoch, or the beginning of it, in a new process.

    Raises
    ------
    ValueError
        If it failed; with the last it said.
    """
    found = run_afresh(__file__, asdict(request), f"{request.shards}: streaming it in a process of its own")
    return Found(**found | {"waits_s": tuple(found["waits_s"])})


def run_afresh(script: str, request: dict[str, Any], what: str) -> dict[str, Any]:
    """Run a script of ours in a new process, with a request as JSON; what its last line says, as JSON.

    Raises
    ------
    ValueError
        If it failed; names `what`, with the last that it said.
    """
    command = [sys.executable, str(Path(script).resolve()), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"{what} failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class PeakMemory:
    """Most anonymous memory of this process above what it had at the start, looked at every 5 ms. A context manager."""

    def __init__(self) -> None:
        self.start_bytes = anonymous_bytes()
        self._highest = self.start_bytes or 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="txfm-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def above_start(self) -> int | None:
        """Bytes, or None where there is no /proc."""
        return None if self.start_bytes is None else self._highest - self.start_bytes

    def _watch(self) -> None:
        while self.start_bytes is not None and not self._stop.wait(_EVERY_S):
            self._highest = max(self._highest, anonymous_bytes() or 0)


def anonymous_bytes() -> int | None:
    """Resident anonymous memory of this process; None where there is no /proc."""
    if not _STATUS.exists():
        return None
    found = re.search(r"^RssAnon:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _stream(request: Request) -> Found:
    import pyarrow as pa

    from shards.manifest import Corpus
    from shards.stream import MaskedStream

    pa.array([0]).to_numpy()  # Arrow imports pandas now, where there is one
    with PeakMemory() as memory:
        since = time.perf_counter()
        stream = MaskedStream(
            Corpus(request.shards), seed=request.seed, global_batch=request.batch, n_unmasked=request.n_unmasked,
            threads=request.threads,
        )  # fmt: skip
        batches = islice(stream.epoch(0), request.n_batches)
        samples = len(next(batches))
        first_batch_s = time.perf_counter() - since
        waits: list[float] = []
        is_left = True
        while is_left:
            if len(waits) < request.n_paced:
                time.sleep(request.interval_s)
            since = time.perf_counter()
            batch = next(batches, None)
            is_left = batch is not None
            if batch is not None and len(waits) < request.n_paced:
                waits.append(time.perf_counter() - since)
            samples += len(batch) if batch is not None else 0
            del batch  # a consumer that is done with a batch lets it go
    return Found(
        samples=samples, imports_bytes=memory.start_bytes, peak_bytes=memory.above_start, first_batch_s=first_batch_s,
        waits_s=tuple(waits),
    )  # fmt: skip


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.stdout.write(json.dumps(asdict(_stream(Request(**json.loads(sys.argv[1]))))) + os.linesep)
