"""The genes over which gene matrices are compared, and the related pairs among them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from txfm_eval.annotations import Annotation


@dataclass(frozen=True)
class Universe:
    """The genes that are compared, and the related pairs among them.

    rows : (U,) int64. Their rows in the gene matrix, ascending.  symbols : (U,) theirs.
    pairs : per database (n, 2) int64, places in `rows`, the first below the second, each pair once.
    n_listed_pairs : per database, pairs of its file.
    n_without_symbol, n_ambiguous, n_unlisted : genes left out: no symbol, a symbol of several genes, in no
    list.
    """

    rows: np.ndarray
    symbols: tuple[str, ...]
    pairs: Mapping[str, np.ndarray]
    n_listed_pairs: Mapping[str, int]
    n_without_symbol: int
    n_ambiguous: int
    n_unlisted: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_null_pairs(self) -> int:
        """All pairs within the universe."""
        return len(self) * (len(self) - 1) // 2


def make_universe(symbols: Sequence[str], annotations: Sequence[Annotation]) -> Universe:
    """Genes with a symbol of their own that is in at least one list, and the listed pairs among them.

    symbols : (G,) per row of the gene matrix, "" where a gene has none.

    Raises
    ------
    ValueError
        If there is no list, or fewer than two genes or no pair of any list are left.
    """
    if not annotations:
        raise ValueError("relationships: no annotation list given; expected at least one")
    times = Counter(symbol for symbol in symbols if symbol)
    listed = {symbol for annotation in annotations for pair in annotation.pairs for symbol in pair}
    rows = [row for row, s in enumerate(symbols) if times[s] == 1 and s in listed]
    place = {symbols[row]: number for number, row in enumerate(rows)}
    pairs = {}
    for annotation in annotations:
        inside = [(place[a], place[b]) for a, b in annotation.pairs if a in place and b in place]
        pairs[annotation.name] = np.sort(np.array(inside, np.int64).reshape(-1, 2), axis=1)
    names = sorted(pairs)
    if len(rows) < 2:
        raise ValueError(
            f"relationships: {len(rows)} of {len(symbols)} genes have a symbol of their own in the lists "
            f"{names}, at least "
            f"2 are needed; the matrix has symbols such as {sorted(times)[:3]}, the lists "
            f"{sorted(listed)[:3]}"
        )
    if not any(len(p) for p in pairs.values()):
        raise ValueError(f"relationships: no pair of {names} has both genes among the {len(rows)} genes compared")
    return Universe(
        rows=np.array(rows, np.int64),
        symbols=tuple(place),
        pairs=pairs,
        n_listed_pairs={annotation.name: len(annotation.pairs) for annotation in annotations},
        n_without_symbol=sum(not symbol for symbol in symbols),
        n_ambiguous=sum(n for n in times.values() if n > 1),
        n_unlisted=sum(n == 1 and symbol not in listed for symbol, n in times.items()),
    )
