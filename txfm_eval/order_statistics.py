"""Exact order statistics of more values than fit in memory, from values that can be made again and again.

Values come in chunks. Each pass counts them in bins of the interval that holds the wanted rank, then narrows
the interval to one bin; when few enough are left they are kept and sorted. The rank of the interval's lower
edge is counted anew in every pass by comparison, so that rounding in the choice of a bin cannot shift a rank.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

_BINS = 1 << 16
_KEEP = 1 << 21
_FINEST = 2.0**-50


@dataclass
class _Search:
    """One wanted rank: values in [low, high) are looked into, `below` of them lie under it.

    span : width of the first interval. Below `_FINEST` of it values are kept, since only ties are that many there.
    """

    rank: int
    low: float
    high: float
    span: float
    keep: bool
    below: int = 0
    bins: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    kept: list[np.ndarray] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)

    def look(self, values: np.ndarray) -> None:
        self.below += int(np.count_nonzero(values < self.low))
        inside = values[(values >= self.low) & (values < self.high)]
        if self.keep:
            distinct, counts = np.unique(inside, return_counts=True)
            self.kept.append(distinct)
            self.counts.append(counts)
            if sum(map(len, self.kept)) > 2 * _KEEP:  # only with many ties, which then shrink to a few values
                self._merge()
        else:
            place = (inside - self.low) * (_BINS / (self.high - self.low))
            self.bins += np.bincount(np.minimum(place.astype(np.int32), _BINS - 1), minlength=_BINS)

    def _merge(self) -> None:
        values, inverse = np.unique(np.concatenate(self.kept), return_inverse=True)
        counts = np.bincount(inverse, weights=np.concatenate(self.counts)).astype(np.int64)
        self.kept, self.counts = [values], [counts]

    def found(self) -> float:
        self._merge()
        place = int(np.searchsorted(np.cumsum(self.counts[0]), self.rank - self.below, side="right"))
        return float(self.kept[0][place])

    def narrowed(self) -> "_Search":
        cumulative = np.cumsum(self.bins)
        bin_number = int(np.searchsorted(cumulative, self.rank - self.below, side="right"))
        width = (self.high - self.low) / _BINS
        margin = max(width * 1e-3, 4 * np.spacing(max(abs(self.low), abs(self.high))))
        low = max(self.low, self.low + bin_number * width - margin)
        high = min(self.high, self.low + (bin_number + 1) * width + margin)
        is_narrow = high - low <= max(_FINEST * self.span, 64 * np.spacing(max(abs(low), abs(high))))
        around = self.bins[max(0, bin_number - 1) : bin_number + 2].sum()
        return _Search(self.rank, low, high, self.span, keep=bool(is_narrow or around <= _KEEP))


def order_statistics(
    chunks: Callable[[], Iterable[np.ndarray]],
    n_values: int,
    ranks: Sequence[int],
    *,
    low: float,
    high: float,
) -> list[float]:
    """Values at places `ranks` (from 0) of the sorted whole; exactly what sorting would give.

    chunks : called once a pass, yields 1-d float64 arrays; the same values every time, all in [low, high].
    n_values : how many values a pass yields in all.

    Raises
    ------
    ValueError
        If a rank is not in 0 .. n_values - 1.
    """
    wrong = [rank for rank in ranks if not 0 <= rank < n_values]
    if wrong:
        raise ValueError(f"order statistics: ranks {wrong} of {n_values} values; expected 0 to {n_values - 1}")
    beyond = float(np.nextafter(high, np.inf))
    searches = [_Search(rank, low, beyond, beyond - low, keep=n_values <= _KEEP) for rank in ranks]
    answers: list[float | None] = [None] * len(ranks)
    while None in answers:
        open_ones = [(place, search) for place, search in enumerate(searches) if answers[place] is None]
        for values in chunks():
            for _, search in open_ones:
                search.look(values)
        for place, search in open_ones:
            if search.keep:
                answers[place] = search.found()
            else:
                searches[place] = search.narrowed()
    return [answer for answer in answers if answer is not None]


def outside(
    values: np.ndarray,
    null: Callable[[], Iterable[np.ndarray]],
    n_null: int,
    shares: tuple[float, float],
    limits: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each value ranks above the upper share of the null distribution, and whether below the lower.

    Above: ``#{null < value} / n_null >= shares[1]``, that is, it exceeds the k-th smallest, k the least with
    ``k / n_null >= shares[1]``. Below: ``#{null <= value} / n_null <= shares[0]``, that is, it is under the one
    after the m-th smallest, m the greatest with ``m / n_null <= shares[0]``.

    null, n_null, limits : as `chunks`, `n_values`, and `low` and `high` of `order_statistics`.
    """
    low, high = shares
    if n_null < 1 or not 0 <= low < high <= 1:
        raise ValueError(
            f"outside: shares {shares} of {n_null} values; expected 0 <= lower < upper <= 1 of at least one"
        )
    k = next(i for i in range(max(0, math.floor(high * n_null) - 1), n_null + 1) if i / n_null >= high)
    m = next(i for i in range(min(n_null, math.ceil(low * n_null) + 1), -1, -1) if i / n_null <= low)
    ranks = [max(k, 1) - 1, min(m, n_null - 1)]
    upper, lower = order_statistics(null, n_null, ranks, low=limits[0], high=limits[1])
    return (values > upper) | (k == 0), values < lower
