"""What the rates of `txfm bench loader` ought to be of each other, and whether they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import quantiles

from shards.bench.fresh import Found
from shards.bench.rounds import Rate, in_turn

MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One number beside what it ought to be.

    value : None where it was not measured; then `why` says why.  unit : "x" for a ratio.
    is_least : whether `goal` is the least that is wanted, else the most.  goal : None for what is only reported.
    """

    name: str
    about: str
    value: float | None
    unit: str = "x"
    goal: float | None = None
    is_least: bool = True
    why: str = ""

    @property
    def is_met(self) -> bool | None:
        """None where nothing was measured or nothing is wanted."""
        if self.value is None or self.goal is None:
            return None
        return self.value >= self.goal if self.is_least else self.value <= self.goal


def goals(rates: Mapping[str, Rate], found: Found, bytes_per_sample: float, no_peer: str) -> list[Goal]:
    """All goals. Ratios are of samples per CPU-second; `no_peer` says why annbatch was not run, if it was not."""
    per_cpu_s = {name: rate.per_cpu_s for name, rate in rates.items()}

    def ratio(name: str, about: str, ours: str, *theirs: str, least: float | None = None) -> Goal:
        value = (
            per_cpu_s[ours] / in_turn(*(per_cpu_s[row] for row in theirs)) if per_cpu_s.keys() >= set(theirs) else None
        )
        return Goal(name=name, about=about, value=value, goal=least, why="" if value is not None else no_peer)

    return [
        ratio("raw_to_annbatch", "raw stream / annbatch", "raw", "annbatch", least=2),
        ratio(
            "masked_to_annbatch_numpy", "masked stream / annbatch, then NumPy", "masked", "annbatch", "mask_numpy", least=3
        ),
        ratio(
            "masked_to_annbatch_mask", "masked stream / annbatch, then our kernels", "masked", "annbatch", "mask", least=1.5
        ),
        ratio(
            "masked_to_decode_mask", "masked stream / decode and mask in memory", "masked", "decode_mask", least=0.7
        ),
        ratio(
            "decode_mask_to_floor", "decode and mask in memory / floor of mask", "decode_mask", "mask_floor", least=0.45
        ),
        ratio("draw_to_floor", "draw / its floor", "draw", "draw_floor"),
        ratio("mask_to_floor", "normalise and mask / its floor", "mask", "mask_floor"),
        ratio("mask_to_numpy", "normalise and mask / NumPy", "mask", "mask_numpy"),
        Goal(
            name="bytes_per_sample", about="bytes a sample on disk", value=bytes_per_sample, unit="B", goal=2_330, is_least=False
        ),
        *_of_the_stream(found),
    ]  # fmt: skip


def _of_the_stream(found: Found) -> list[Goal]:
    waits_ms = sorted(1_000 * wait for wait in found.waits_s)
    no_wait = "" if waits_ms else "the epoch has only one batch"
    p99 = quantiles(waits_ms, n=100, method="inclusive")[98] if len(waits_ms) > 1 else waits_ms[0] if waits_ms else None
    peak = None if found.peak_bytes is None else found.peak_bytes / MB
    return [
        Goal(
            name="first_batch_s", about="first batch after opening, new process", value=found.first_batch_s, unit="s", goal=2,
            is_least=False,
        ),
        Goal(
            name="longest_stall_ms", about="longest wait of a steady consumer", value=waits_ms[-1] if waits_ms else None,
            unit="ms", goal=20, is_least=False, why=no_wait,
        ),
        Goal(name="stall_p99_ms", about="99th percentile of its waits", value=p99, unit="ms", is_least=False, why=no_wait),
        Goal(
            name="peak_anonymous_mb", about="peak memory of the masked stream above imports", value=peak, unit="MB", goal=400,
            is_least=False, why="" if peak is not None else "there is no /proc",
        ),
    ]  # fmt: skip
