"""Rows computed by several processes, kept beside the output until it can be written whole, or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from txfm_data.progress import Progress
from txfm_model.embedding.processes import Processes
from txfm_model.embedding.samples import Part, SampleInput

ComputePart = Callable[[Part, Progress], np.ndarray]
"""From a part and a progress callback (in its samples) to (n, width) float32."""


@contextmanager
def staged(out: Path, processes: Processes) -> Iterator[Path]:
    """Give all processes one folder beside `out`, removed at the end, whatever happens."""
    if processes.rank == 0:
        folder = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        processes.publish("staging", str(folder.absolute()))
    else:
        folder = Path(processes.wait_for("staging"))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if processes.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


def compute_parts(
    source: SampleInput,
    folder: Path,
    processes: Processes,
    compute: ComputePart,
    dtype: np.dtype[Any],
    progress: Progress,
) -> None:
    """Compute this process' parts, every `size`-th, into its file; which part is whose does not change a number."""
    mine = range(processes.rank, source.n_parts, processes.size)
    total, before = sum(source.rows_of(number) for number in mine), 0
    with _file_of(folder, processes.rank).open("wb") as file:
        for number in mine:
            part = source.read(number)

            def show(done: int, of_part: int, before: int = before) -> None:
                if done < of_part:  # the end of the part is shown below, whether or not its last samples have counts
                    progress(before + done, total)

            values = compute(part, show)
            _narrowed(values, dtype, part, source).tofile(file)
            before += len(part)
            progress(before, total)
            processes.raise_if_failed()
        file.flush()
        os.fsync(file.fileno())
    processes.publish(f"computed/{processes.rank}")


def computed_parts(
    source: SampleInput, folder: Path, processes: Processes, width: int, dtype: np.dtype[Any]
) -> Iterator[np.ndarray]:
    """Rows of all samples in order, part by part, once every process has computed its own; for the first process."""
    for rank in range(processes.size if processes.size > 1 else 0):
        processes.wait_for(f"computed/{rank}")
    files = [_file_of(folder, rank).open("rb") for rank in range(processes.size)]
    try:
        for number in range(source.n_parts):
            n_values = source.rows_of(number) * width
            data = files[number % processes.size].read(n_values * dtype.itemsize)
            if len(data) != n_values * dtype.itemsize:
                raise OSError(
                    f"{folder}: {len(data)} bytes of part {number}, expected {n_values * dtype.itemsize}; the processes do not "
                    "share this folder: write to one that all machines see"
                )
            yield np.frombuffer(data, dtype).reshape(-1, width)
    finally:
        for file in files:
            file.close()


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"process-{rank:05d}.raw"


def _narrowed(values: np.ndarray, dtype: np.dtype[Any], part: Part, source: SampleInput) -> np.ndarray:
    """The rows in the dtype of the output; what is no number, or too large for it, is refused."""
    bad = ~np.isfinite(values).all(axis=1) & (part.library_size > 0)
    if bad.any():
        raise ValueError(
            f"{source.where}: the model gives {source.name_of(part.start + int(np.argmax(bad)))} values that are not finite; "
            "check the checkpoint with txfm verify"
        )
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(values.astype(dtype))
    lost = np.isinf(narrow).any(axis=1)
    if lost.any():
        at = int(np.argmax(lost))
        raise ValueError(
            f"{source.where}: {source.name_of(part.start + at)} has the value {np.abs(values[at]).max():g}, which {dtype} cannot "
            "hold; pass --dtype float32"
        )
    return narrow
