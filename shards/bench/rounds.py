"""Rates of several pieces of work, measured in turns, so that a busy moment of the machine strikes all of them."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from txfm_data.progress import Progress, ignore


@dataclass(frozen=True)
class Spent:
    """What one run took. samples : it gave.  wall_s, cpu_s : seconds; CPU time is of the whole process, all threads."""

    samples: int
    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Rate:
    """Medians over the rounds, and the rounds themselves in order. All in samples per second, of wall or CPU time."""

    per_s: float
    per_cpu_s: float
    rounds_per_cpu_s: tuple[float, ...]


Work = Callable[[int], Spent]
"""One run; its argument is the number of the round, 0 for the one that warms up."""


def timed(run: Callable[[int], int]) -> Work:
    """Measure a run in this process that returns how many samples it gave."""

    def work(number: int) -> Spent:
        wall, cpu = time.perf_counter(), time.process_time()
        samples = run(number)
        return Spent(samples, time.perf_counter() - wall, time.process_time() - cpu)

    return work


def alternate(works: Mapping[str, Work], rounds: int, progress: Progress = ignore) -> dict[str, Rate]:
    """Run all pieces of work once to warm up, then `rounds` times in turns."""
    spent: dict[str, list[Spent]] = {name: [] for name in works}
    for number in range(rounds + 1):
        gc.collect()  # so that no row cleans up after another; once a round, since it takes longer than some rows
        for i, (name, work) in enumerate(works.items()):
            spent[name].append(work(number))
            progress(number * len(works) + i + 1, (rounds + 1) * len(works))
    return {name: _rate(runs[1:]) for name, runs in spent.items()}


def _rate(runs: Sequence[Spent]) -> Rate:
    per_cpu_s = tuple(run.samples / max(run.cpu_s, 1e-9) for run in runs)
    return Rate(median(run.samples / max(run.wall_s, 1e-9) for run in runs), median(per_cpu_s), per_cpu_s)


def in_turn(*per_s: float) -> float:
    """Rate of doing one thing after the other to each sample, from the rates of each alone."""
    return 1 / sum(1 / rate for rate in per_s)
