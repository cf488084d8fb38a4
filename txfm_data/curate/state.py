"""What is left of a store while rules are applied, and what the rules share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from txfm_data.parallel import Pool
from txfm_data.progress import Progress, ignore
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store

if TYPE_CHECKING:
    from txfm_data.curate.recipe import EmbeddingSpec

Details = dict[str, dict[str, Any]]
"""What a rule has to tell beyond numbers of samples and genes: by name of dataset, ready for JSON."""


@dataclass
class State:
    """Samples and genes that are left.

    records : datasets of the curation, in the order of the store.
    alive : (store.n_obs,) bool, samples that are left; False outside of `records`.
    is_val : (store.n_obs,) bool, samples held out; None until a rule holds out.
    panels : for each dataset by name, ascending tokens of the store that are left, int64.
    """

    store: Store
    records: tuple[DatasetRecord, ...]
    alive: np.ndarray
    panels: dict[str, np.ndarray]
    is_val: np.ndarray | None = None

    @classmethod
    def of(cls, store: Store, records: tuple[DatasetRecord, ...]) -> "State":
        """All samples and genes of some datasets."""
        alive = np.zeros(store.n_obs, bool)
        for record in records:
            alive[record.obs_start : record.obs_stop] = True
        return cls(store, records, alive, {r.name: store.panel(r).astype(np.int64) for r in records})

    def rows(self, record: DatasetRecord) -> np.ndarray:
        """Sample ids of a dataset that are left: (n,) int64, ascending."""
        return np.flatnonzero(self.alive[record.obs_start : record.obs_stop]) + record.obs_start

    def n_samples(self, record: DatasetRecord) -> int:
        """How many samples of a dataset are left."""
        return int(np.count_nonzero(self.alive[record.obs_start : record.obs_stop]))

    def n_union(self) -> int:
        """Genes of the vocabulary: those left in at least one dataset that has samples."""
        used = np.zeros(len(self.store.vocabulary), bool)
        for record in self.records:
            if self.n_samples(record):
                used[self.panels[record.name]] = True
        return int(used.sum())


class Embedder(Protocol):
    """Embeds chosen samples of a store with a model; given by who may import the models."""

    def __call__(
        self,
        spec: "EmbeddingSpec",
        store: Store,
        record: DatasetRecord,
        rows: np.ndarray,
        panel: np.ndarray,
        out: Path,
        progress: Progress,
    ) -> None:
        """Write `out`, an npy file: (len(rows), d) float32, one row for each of the ascending sample ids `rows`.

        panel : ascending tokens of the store; the genes that count as measured.
        """
        ...


def say_nothing(text: str) -> None:
    """Tell nobody."""


def no_progress(label: str) -> Progress:
    """Show nothing."""
    return ignore


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a rule works with.

    seed : the recipe's.  number : of the rule, from 1.  pool, n_workers : where blocks are worked on.
    memory : bytes that the rule may use beyond what the process holds already.
    scratch : empty folder for what the rule needs meanwhile.  extras : folder of further files of the selection (tables, figures).
    embed : for embeddings from a checkpoint; None where no model can be opened.
    progress : makes the callback of one task from its label.
    """

    seed: int
    number: int
    pool: Pool
    scratch: Path
    extras: Path
    n_workers: int = 1
    memory: int = 1024**3
    embed: Embedder | None = None
    progress: Callable[[str], Progress] = field(default=no_progress)
    say: Callable[[str], None] = field(default=say_nothing)
