"""Relationship recall of a gene matrix: whether genes known to be related lie close together in it.

Genes are restricted to a universe, the matrix is centred over it, and all pairs within it give the null
distribution of cosines. A related pair is recalled one-sided if at least 95 % of all pairs have a lower
cosine, two-sided if that holds or at most 5 % have none higher. A random matrix recalls 5 % and 10 %.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from txfm_data.progress import Progress, ignore
from txfm_eval.annotations import Annotation
from txfm_eval.order_statistics import outside
from txfm_eval.universe import Universe, make_universe

LOW, HIGH = 0.05, 0.95
_BLOCK_BYTES = 6 * 1024**2
_COSINE_LIMIT = 1.0 + 1e-9
_NO_DIRECTION = 1e-12


@dataclass(frozen=True)
class Recall:
    """Recalled pairs of one list; a share is None when the list has no pair in the universe."""

    n_pairs: int
    n_one_sided: int
    n_two_sided: int

    @property
    def one_sided(self) -> float | None:
        """Share of the pairs above the upper threshold."""
        return self.n_one_sided / self.n_pairs if self.n_pairs else None

    @property
    def two_sided(self) -> float | None:
        """Share of the pairs above the upper or below the lower threshold."""
        return self.n_two_sided / self.n_pairs if self.n_pairs else None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; recall in percent."""
        percent = {"one_sided": self.one_sided, "two_sided": self.two_sided}
        shown = {f"{name}_percent": None if value is None else 100 * value for name, value in percent.items()}
        return {"n_pairs": self.n_pairs, **shown}


def relationship_recall(
    matrix: np.ndarray, universe: Universe, *, low: float = LOW, high: float = HIGH, name: str = "gene matrix"
) -> dict[str, Recall]:
    """Recall per database, over the concatenated lists ("combined") and over their union.

    matrix : (G, d) float, a row per gene.  name : what errors call it.

    Raises
    ------
    TypeError, ValueError
        If the matrix is not of numbers, has too few rows, or holds NaN or infinity; the genes are named.
    """
    vectors = _directions(matrix, universe, name)
    return _recall(vectors, universe, low, high)


def random_control(
    n_dims: int, universe: Universe, *, draws: int = 3, seed: int = 0, low: float = LOW, high: float = HIGH
) -> dict[str, dict[str, float | None]]:
    """Recall in percent of Gaussian matrices of `n_dims` columns: mean and sd (ddof 1) over the draws."""
    if draws < 2:
        raise ValueError(f"random control: {draws} draws, at least 2 are needed for a spread")
    found = []
    for draw in range(draws):
        gaussian = np.random.default_rng([seed, draw]).normal(size=(len(universe), n_dims))
        found.append(_recall(_normalized(gaussian), universe, low, high))
    result: dict[str, dict[str, float | None]] = {}
    for database, first in found[0].items():
        row: dict[str, float | None] = {}
        for side in ("one_sided", "two_sided"):
            values = [getattr(recall[database], side) for recall in found]
            row[f"{side}_percent"] = None if first.n_pairs == 0 else float(100 * np.mean(values))
            row[f"{side}_sd"] = None if first.n_pairs == 0 else float(100 * np.std(values, ddof=1))
        result[database] = row
    return result


def evaluate_relationships(
    matrices: Mapping[str, np.ndarray],
    symbols: Sequence[str],
    annotations: Sequence[Annotation],
    *,
    draws: int = 3,
    seed: int = 0,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Recall of several matrices of the same genes with the random control beside each; ready for JSON.

    matrices : name to (G, d), rows as in `symbols`.  draws, seed : of the random control.
    progress : called with matrices scored, random ones included, and matrices in all.
    """
    universe = make_universe(symbols, annotations)
    controls: dict[int, dict[str, dict[str, float | None]]] = {}
    scores = {}
    total = len(matrices) * (1 + draws)
    for number, (name, matrix) in enumerate(matrices.items()):
        progress(number * (1 + draws), total)
        vectors = _directions(matrix, universe, name)
        recall = _recall(vectors, universe, LOW, HIGH)
        n_dims = vectors.shape[1]
        if n_dims not in controls:
            controls[n_dims] = random_control(n_dims, universe, draws=draws, seed=seed)
        scores[name] = {
            "n_dims": n_dims,
            "n_genes_without_direction": int((~vectors.any(axis=1)).sum()),
            "recall": {database: part.as_dict() for database, part in recall.items()},
            "random": controls[n_dims],
        }
    progress(total, total)
    return {
        "matrices": scores,
        "universe": {
            "n_genes": len(universe),
            "n_null_pairs": universe.n_null_pairs,
            "n_genes_in_matrix": len(symbols),
            "n_without_symbol": universe.n_without_symbol,
            "n_ambiguous_symbol": universe.n_ambiguous,
            "n_in_no_list": universe.n_unlisted,
        },
        "databases": {
            a.name: {
                "n_listed_pairs": len(a.pairs),
                "n_pairs": len(universe.pairs[a.name]),
                "sha256": a.sha256,
            }
            for a in annotations
        },
        "random_draws": draws,
        "notes": _notes(universe),
    }


def _notes(universe: Universe) -> list[str]:
    notes = []
    if universe.n_null_pairs < 20:
        notes.append(
            f"the universe has {universe.n_null_pairs} pairs; with fewer than 20 none can rank above 95 % of "
            "them, so recall is 0"
        )
    empty = sorted(name for name, pairs in universe.pairs.items() if not len(pairs))
    if empty:
        notes.append(f"no pair of {', '.join(empty)} has both genes in the universe")
    return notes


def _directions(matrix: np.ndarray, universe: Universe, name: str) -> np.ndarray:
    """Rows of the universe, centred over it and scaled to length 1; (U, d) float64."""
    matrix = np.asarray(matrix)
    if matrix.dtype.kind not in "fiu":
        raise TypeError(f"{name}: values of type {matrix.dtype}, expected numbers")
    if matrix.ndim != 2 or len(matrix) <= int(universe.rows[-1]):
        raise ValueError(
            f"{name}: shape {matrix.shape}, expected a row for each gene and at least {universe.rows[-1] + 1} rows"
        )
    vectors = matrix[universe.rows].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        genes = [universe.symbols[row] for row in bad[:5]]
        raise ValueError(
            f"{name}: NaN or infinity in the vectors of {len(bad)} genes, for example {genes}; the model has "
            "diverged or the "
            "file is damaged"
        )
    return _normalized(vectors)


def _normalized(vectors: np.ndarray) -> np.ndarray:
    size = np.abs(vectors).max()
    vectors = vectors - vectors.mean(axis=0)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: np.ndarray = np.zeros_like(vectors)  # a gene at the mean has none: its cosine is 0 with all
    np.divide(vectors, norm, out=directions, where=norm > _NO_DIRECTION * size)
    return directions


def _recall(vectors: np.ndarray, universe: Universe, low: float, high: float) -> dict[str, Recall]:
    names = list(universe.pairs)
    stacked = np.concatenate([universe.pairs[name] for name in names])
    distinct, place = np.unique(stacked, axis=0, return_inverse=True)
    cosines = _pair_cosines(vectors, distinct)
    n_null, limits = universe.n_null_pairs, (-_COSINE_LIMIT, _COSINE_LIMIT)
    is_above, is_below = outside(cosines, lambda: _null_chunks(vectors), n_null, (low, high), limits)

    def score(chosen: np.ndarray) -> Recall:
        above = int(is_above[chosen].sum())
        return Recall(len(chosen), above, int((is_above | is_below)[chosen].sum()))

    place = place.reshape(-1)
    ends = np.cumsum([len(universe.pairs[name]) for name in names])
    result = {name: score(part) for name, part in zip(names, np.split(place, ends[:-1]), strict=True)}
    return {**result, "combined": score(place), "union": score(np.arange(len(distinct)))}


def _blocks(vectors: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cosines of rows start..stop with all rows from start on, a bounded number of bytes at a time."""
    n, start = len(vectors), 0
    while start < n:
        stop = min(n, start + max(1, _BLOCK_BYTES // (8 * (n - start))))
        yield start, stop, vectors[start:stop] @ vectors[start:].T
        start = stop


def _null_chunks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    for start, stop, cosines in _blocks(vectors):
        rows = stop - start
        yield cosines[:, :rows][np.triu_indices(rows, 1)]
        yield cosines[:, rows:].reshape(-1)


def _pair_cosines(vectors: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosines of sorted pairs, from the blocks of the null: a pair that is the threshold must equal it."""
    found = np.empty(len(pairs))
    for start, stop, cosines in _blocks(vectors):
        first, last = np.searchsorted(pairs[:, 0], [start, stop])
        part = pairs[first:last]
        found[first:last] = cosines[part[:, 0] - start, part[:, 1] - start]
    return found
