"""Sizes and seed of a simulated corpus."""

import math
from dataclasses import dataclass, fields

from txfm_data.vocabulary import MAX_GENES

DATASETS = ("sim_blood", "sim_lung", "sim_lines", "sim_screen", "sim_bulk")
HELD_OUT = "sim_lung"
STATEMENT = (
    "This dataset is simulated: its counts were drawn from a random generator by txfm simulate. No sample, "
    "gene, cell type "
    "or perturbation in it exists, and nothing in it is evidence about biology."
)
PROGRAM_GENES = 0.6
"""Share of the genes that belong to a program."""
STRONG = 2 / 3
"""Share of the perturbations that do something."""
MIN_SAMPLES = 40
"""Smallest number of samples of a dataset."""
_CELL_SHARES = {"sim_blood": 0.3, "sim_lung": 0.2, "sim_lines": 0.2, "sim_screen": 0.3}


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """What a simulated corpus holds; the defaults are those of the quickstart."""

    seed: int = 0
    """Seed of every random choice; the same seed and sizes give the same counts."""
    cells: int = 5000
    """Single cells, over the four single-cell datasets together."""
    bulk_samples: int = 200
    """Samples of the bulk dataset."""
    genes: int = 1500
    """Genes over all datasets; each dataset measures a part of them."""
    programs: int = 24
    """Gene programs; six genes in ten are dealt to them evenly, the others belong to none."""
    perturbations: int = 24
    """Perturbations of the screen; two thirds are strong, the others have no effect at all."""
    pairs_per_program: int = 200
    """Gene pairs written per program at most; a larger program has a random part of its pairs written."""
    threads: int = 2
    """Threads that draw counts; memory grows with it, the counts do not depend on it."""

    def __post_init__(self) -> None:
        least = {"seed": 0, "programs": 24, "perturbations": 3, "pairs_per_program": 1, "threads": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.bulk_samples < MIN_SAMPLES:
            raise ValueError(f"bulk_samples must be at least {MIN_SAMPLES}, got {self.bulk_samples}")
        if self.cells < 5 * MIN_SAMPLES:
            raise ValueError(f"cells must be at least {5 * MIN_SAMPLES} over four datasets, got {self.cells}")
        if not 6 * self.programs <= self.genes * PROGRAM_GENES or self.genes > MAX_GENES:
            low = math.ceil(6 * self.programs / PROGRAM_GENES - 1e-9)
            raise ValueError(
                f"genes must be between {low} (six a program, {self.programs} programs in 60 % of the genes) and "
                f"{MAX_GENES}, got {self.genes}"
            )
        if 8 * self.perturbations > self.genes:
            raise ValueError(
                f"perturbations must be at most an eighth of the genes ({self.genes // 8} of {self.genes}), "
                "since each "
                f"needs its own target, got {self.perturbations}"
            )

    def samples(self) -> dict[str, int]:
        """Return the samples of each dataset; the single cells add up to `cells`."""
        sizes = {name: int(self.cells * share) for name, share in _CELL_SHARES.items()}
        sizes["sim_blood"] += self.cells - sum(sizes.values())
        return {**sizes, "sim_bulk": self.bulk_samples}

    def recorded(self) -> dict[str, int]:
        """Return the settings that decide the counts, for `truth.json`."""
        return {f.name: getattr(self, f.name) for f in fields(SimulationConfig) if f.name != "threads"}
