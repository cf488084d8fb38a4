"""Frequency-weighted draw of unmasked genes: how often a gene was seen decides how likely it is shown (spec A.5).

K genes are drawn one after another without replacement, each time with probability proportional to w = max(n, 1)^τ among
those left. That is the same as K runners of least -ln(u) / w (Efraimidis and Spirakis 2006): a race with one hash a gene,
so the draw depends on its key alone and needs no state. At τ = 0 `kernels.draw_unmasked` is 15 times faster.
"""

import math

import numpy as np
from numba import njit

from txfm_data.kernels import _GOLDEN, mix

__all__ = ["draw_weighted", "inverse_weights"]

_ONE, _S11, _S52 = np.uint64(1), np.uint64(11), np.int64(52)
_ROOT_HALF = np.int64(0x3FE6A09E667F3BCD)  # bits of the square root of 1/2
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LARGEST_LOG_WEIGHT = 500.0


def inverse_weights(n_nonzero: np.ndarray, temperature: float) -> np.ndarray:
    """1 / w of every gene of the vocabulary, w = max(n, 1)^temperature; `draw_weighted` multiplies by it.

    Parameters
    ----------
    n_nonzero
        (G,) int64. Train samples in which each gene was seen; a gene never seen counts as seen once.
    temperature
        τ of the spec, a power without unit. 0: all alike; above 0 shows frequent genes more often, below 0 rare ones.

    Returns
    -------
    np.ndarray
        (G,) float64, finite and above 0.

    Raises
    ------
    ValueError
        If counts are negative or not one row of integers, or the temperature is not finite or takes weights beyond e^±500.
    """
    n_nonzero = np.asarray(n_nonzero)
    if n_nonzero.ndim != 1 or n_nonzero.dtype.kind not in "iu":
        raise ValueError(
            f"n_nonzero must be one row of integers, one per gene; got {n_nonzero.dtype} of shape {n_nonzero.shape}; "
            "pass n_nonzero of the corpus statistics"
        )
    if n_nonzero.size and n_nonzero.min() < 0:
        gene = int(np.argmax(n_nonzero < 0))
        raise ValueError(
            f"n_nonzero of gene {gene} is {n_nonzero[gene]}, but it is a number of samples, 0 or more; "
            "build the corpus again"
        )
    log_n = np.log(np.maximum(n_nonzero, 1).astype(np.float64))
    largest = float(log_n.max()) if log_n.size else 0.0
    if not abs(temperature) * largest <= _LARGEST_LOG_WEIGHT:  # so written, NaN is refused too
        raise ValueError(
            f"mask.temperature {temperature!r} makes a weight of {math.exp(largest):,.0f} to that power, beyond e^±500; "
            "choose one between -4 and 4"
        )
    return np.asarray(np.maximum(n_nonzero, 1).astype(np.float64) ** -float(temperature))


@njit(nogil=True, cache=True, inline="always", error_model="numpy")
def _minus_log(u):  # type: ignore[no-untyped-def]
    """-ln(u) to within an ulp, u normal float64 up to 1, by the polynomial of fdlibm's e_log.c.

    In place of the library's: the compiler makes vectors of it (18 us for 20,000 against 70), and a mask does not depend on
    whose mathematical library is installed.
    """
    bits = np.float64(u).view(np.int64)
    exponent = (bits - _ROOT_HALF) >> _S52
    f = np.int64(bits - (exponent << _S52)).view(np.float64) - 1.0  # u = (1 + f) 2^exponent, 1 + f around 1
    s = f / (2.0 + f)
    z = s * s
    tail = 1.818357216161805012e-01 + z * (1.531383769920937332e-01 + z * 1.479819860510658591e-01)
    tail = 2.857142874366239149e-01 + z * (2.222219843214978396e-01 + z * tail)
    tail = z * (6.666666666666735130e-01 + z * (3.999999999940941908e-01 + z * tail))
    half = 0.5 * f * f
    e = np.float64(exponent)
    return ((half - (s * (half + tail) + e * _LN2_LOW)) - f) - e * _LN2_HIGH


@njit(nogil=True, cache=True, error_model="numpy")
def _race(key, genes, inverse, times):  # type: ignore[no-untyped-def]
    """Write -ln(u) / w of every position of the panel to `times` (P,) float64."""
    # Three loops, since the compiler makes vectors of each, but not of one that does all.
    for j in range(genes.shape[0]):
        draw = mix(key + (np.uint64(j) + _ONE) * _GOLDEN)
        times[j] = (np.float64(draw >> _S11) + 0.5) * 2.0**-53
    for j in range(genes.shape[0]):
        times[j] = _minus_log(times[j])
    for j in range(genes.shape[0]):
        times[j] *= inverse[genes[j]]


@njit(nogil=True, cache=True)
def _kth_least(values, k):  # type: ignore[no-untyped-def]
    """Value at position k, from 0, of sorted `values` (n,) float64 without NaN; reorders them. O(n) expected."""
    low, high, rank = np.uint64(0), np.uint64(values.shape[0]), np.uint64(k)
    while high - low > _ONE:
        first, middle, last = values[low], values[(low + high) >> _ONE], values[high - _ONE]
        pivot = max(min(first, last), min(max(first, last), middle))
        # Always swapped and sometimes counted: a branch would be guessed wrong for every other value (4 times slower).
        cut = low
        for j in range(low, high):
            value = values[j]
            values[j] = values[cut]
            values[cut] = value
            cut += np.uint64(value < pivot)
        if rank < cut:
            high = cut
        elif cut > low:
            low = cut
        else:  # nothing is below the pivot: set those equal to it aside
            for i in range(low, high):
                value = values[i]
                values[i] = values[cut]
                values[cut] = value
                cut += np.uint64(value == pivot)
            if rank < cut:
                return pivot
            low = cut
    return values[rank]


@njit(nogil=True, cache=True)
def draw_weighted(key, genes, inverse, race, out):  # type: ignore[no-untyped-def]
    """Draw ``len(out)`` positions of a panel without replacement, weighted: those of least -ln(u) / w.

    u of position j is ((d >> 11) + 0.5) 2^-53 in float64, d draw j + 1 of the stream of `key`. The result depends on
    (key, genes, inverse, K) alone. Of equal times, which all but never happen, the earlier position is drawn.

    key : uint64. Of `stream_key`.  genes : (P,) uint16, token ids of the panel.
    inverse : (G,) float64 of `inverse_weights`, for the whole vocabulary; finite, 0 or more.
    race : (>= 2 P,) float64. Scratch, of any content.
    out : (K,) uint16, K <= P. The positions drawn, ascending.
    """
    size, n = genes.shape[0], out.shape[0]
    if n == 0:
        return
    times = race[:size]
    _race(np.uint64(key), genes, inverse, times)
    order = race[size : 2 * size]
    order[:] = times
    last = _kth_least(order, n - 1)
    surplus = -n
    for j in range(size):
        surplus += times[j] <= last
    loser = np.uint64(size)
    while surplus > 0:  # of equal times the later positions lose
        loser -= _ONE
        if times[loser] == last:
            times[loser] = np.inf
            surplus -= 1
    # Always written and sometimes counted, as above.
    position, drawn = np.uint64(0), np.uint64(0)
    while drawn < np.uint64(n):
        out[drawn] = position
        drawn += np.uint64(times[position] <= last)
        position += _ONE
