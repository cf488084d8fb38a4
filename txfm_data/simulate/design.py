"""Genes, programs, panels and datasets of a simulated corpus: all that is fixed before a count is drawn.

The model of a sample: each program p has an activity z_p, which is the mean of the sample's cell type plus
noise of its own and the shift of its perturbation. A gene of program p has log rate ``base + loading * z_p``;
a gene of no program keeps its base. A batch adds a small shift to every gene. Rates are scaled to the
sample's depth over the genes of the panel; counts are Poisson with gamma-distributed rate (negative
binomial).
"""

from dataclasses import dataclass, field

import numpy as np

from txfm_data.simulate.config import HELD_OUT, PROGRAM_GENES, STRONG, SimulationConfig

BLOCK_SAMPLES = 256
"""Samples that are drawn at once from one generator; part of what a seed means, so it is not a setting."""
CONTROL = "non-targeting"
KNOCKDOWN = 0.15
"""What is left of the target's rate under a strong perturbation."""
TYPE_SD = 1.2
"""Spread of a program's mean activity over cell types, log."""
CORE_SHARE = 0.4
"""Share of the genes that every dataset measures."""
PRIVATE_SHARE = 0.1
"""Share of the genes that one dataset alone measures."""
_SLOTS = 240


@dataclass(frozen=True)
class Genes:
    """All genes of the corpus.

    program : (G,) int32, -1 for none.  loading : (G,), 0 for none.  log_base : (G,).  dispersion : (G,), the
    gamma shape.
    """

    program: np.ndarray
    loading: np.ndarray
    log_base: np.ndarray
    dispersion: np.ndarray

    def __len__(self) -> int:
        return len(self.program)

    @property
    def ids(self) -> np.ndarray:
        """Ensembl-like ids, which no real gene has."""
        return np.array([f"ENSG99{row + 1:09d}" for row in range(len(self))], dtype=object)

    @property
    def symbols(self) -> np.ndarray:
        """Symbols SIM00001, SIM00002 and so on."""
        return np.array([f"SIM{row + 1:05d}" for row in range(len(self))], dtype=object)


@dataclass(frozen=True)
class Perturbations:
    """Perturbations of one dataset; row 0 is the control.

    names : what obs holds.  target : (R,) int64 gene, -1 for the control.  is_strong : (R,) bool.
    shift : (R, programs) change of the programs' activity.
    """

    names: tuple[str, ...]
    target: np.ndarray
    is_strong: np.ndarray
    shift: np.ndarray

    def effects(self) -> tuple[str, ...]:
        """Truth per row: control, strong or null."""
        return ("control", *("strong" if strong else "null" for strong in self.is_strong[1:]))


@dataclass(frozen=True)
class Dataset:
    """One dataset before its counts: who is in it and how deep it is read.

    panel : genes measured, sorted.  activity : (types, programs).  batch_shift : (batches, P) log.
    batch_depth : (batches,).
    type_slots, batch_slots, perturbation_slots : labels dealt to samples in turn, then shuffled within a
    block.
    depth : mean counts of a sample.  depth_sd : sd of its log.  activity_sd : sd of a sample's own activity.
    overdispersion : divides the gamma shape.
    """

    name: str
    number: int
    n_obs: int
    modality: str
    panel: np.ndarray
    types: tuple[str, ...]
    activity: np.ndarray
    type_slots: np.ndarray
    batches: tuple[str, ...]
    batch_slots: np.ndarray
    batch_shift: np.ndarray
    batch_depth: np.ndarray
    depth: float
    depth_sd: float
    activity_sd: float
    overdispersion: float
    perturbations: Perturbations | None = None
    perturbation_slots: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    @property
    def is_held_out(self) -> bool:
        """Whether the dataset is meant for embedding only."""
        return self.name == HELD_OUT


@dataclass(frozen=True)
class Design:
    """The whole corpus before its counts."""

    config: SimulationConfig
    genes: Genes
    datasets: tuple[Dataset, ...]

    @property
    def programs(self) -> tuple[str, ...]:
        """Names of the programs, SIM_P01 and so on."""
        return tuple(f"SIM_P{p + 1:02d}" for p in range(self.config.programs))


@dataclass(frozen=True)
class _Traits:
    """How the five datasets differ: counts per measured gene, at most so many a sample, and the rest."""

    batches: int
    extra_share: float
    depth_per_gene: float
    depth_limit: float
    depth_sd: float = 0.35
    activity_sd: float = 0.6
    overdispersion: float = 1.0


_TRAITS = {
    "sim_blood": _Traits(batches=8, extra_share=0.40, depth_per_gene=1.2, depth_limit=6_000),
    "sim_lung": _Traits(batches=4, extra_share=0.30, depth_per_gene=1.6, depth_limit=9_000, depth_sd=0.5),
    "sim_lines": _Traits(batches=6, extra_share=0.65, depth_per_gene=3.5, depth_limit=25_000),
    "sim_screen": _Traits(batches=8, extra_share=0.15, depth_per_gene=2.0, depth_limit=15_000, activity_sd=0.4),
    "sim_bulk": _Traits(
        batches=4,
        extra_share=0.85,
        depth_per_gene=20_000,
        depth_limit=5e7,
        activity_sd=0.4,
        overdispersion=0.2,
    ),
}


def make_design(config: SimulationConfig) -> Design:
    """Draw everything but the counts; the same for the same `config`, whatever its threads."""
    rng = np.random.default_rng([config.seed, 0])
    genes = _make_genes(rng, config)
    panels = _make_panels(rng, config.genes)
    types = _make_types(rng, config.programs)
    datasets = []
    for number, (name, n_obs) in enumerate(config.samples().items()):
        perturbations = _make_perturbations(rng, config, genes, panels[name]) if name == "sim_screen" else None
        datasets.append(_make_dataset(rng, number, name, n_obs, panels[name], types[name], perturbations))
    return Design(config, genes, tuple(datasets))


def _make_genes(rng: np.random.Generator, config: SimulationConfig) -> Genes:
    n, n_members = config.genes, int(config.genes * PROGRAM_GENES)
    program = np.full(n, -1, np.int32)
    program[rng.permutation(n)[:n_members]] = np.arange(n_members) % config.programs
    has_program = program >= 0
    loading = np.where(has_program, rng.uniform(0.8, 1.3, n), 0.0)
    log_base = np.where(has_program, rng.normal(0.0, 0.8, n), rng.normal(0.0, 1.3, n))
    return Genes(program, loading, log_base, rng.lognormal(np.log(10.0), 0.4, n))


def _make_panels(rng: np.random.Generator, n_genes: int) -> dict[str, np.ndarray]:
    """Draw each dataset's genes: a core that all measure, some of one alone, part of the rest."""
    names = list(_TRAITS)
    order = rng.permutation(n_genes)
    n_core, n_private = int(n_genes * CORE_SHARE), int(n_genes * PRIVATE_SHARE)
    home = rng.integers(0, len(names), n_genes)
    may_share = np.ones(n_genes, bool)
    may_share[order[n_core : n_core + n_private]] = False
    panels = {}
    for number, (name, traits) in enumerate(_TRAITS.items()):
        measured = (home == number) | (may_share & (rng.random(n_genes) < traits.extra_share))
        measured[order[:n_core]] = True
        panels[name] = np.flatnonzero(measured)
    return panels


def _make_types(rng: np.random.Generator, n_programs: int) -> dict[str, dict[str, np.ndarray]]:
    """Draw the mean activity of programs by dataset and cell type.

    Activities are centred over the types of a dataset (over all twelve for blood and lung), so that datasets differ
    in their genes and types more than in their means. The line of the screen is close to the centre.
    """

    def drawn(prefix: str, n_types: int, sd: float) -> dict[str, np.ndarray]:
        activity = rng.normal(0.0, sd, (n_types, n_programs))
        return {f"{prefix}{row + 1:02d}": values for row, values in enumerate(activity - activity.mean(axis=0))}

    cells, lines = drawn("sim_T", 12, TYPE_SD), drawn("sim_L", 5, TYPE_SD)
    names = list(cells)
    return {
        "sim_blood": {name: cells[name] for name in names[:8]},
        "sim_lung": {name: cells[name] for name in names[4:]},
        "sim_lines": lines,
        "sim_screen": {"sim_L06": rng.normal(0.0, 0.2, n_programs)},
        "sim_bulk": drawn("sim_tissue_", 6, TYPE_SD),
    }


def _make_perturbations(
    rng: np.random.Generator, config: SimulationConfig, genes: Genes, panel: np.ndarray
) -> Perturbations:
    """Strong ones knock down a member of a program and move it and a partner, alike for all its members."""
    n_programs, n_strong = config.programs, round(config.perturbations * STRONG)
    order, partner = rng.permutation(n_programs), np.roll(rng.permutation(n_programs), 1)
    move = rng.choice([-1.0, 1.0], n_programs) * rng.uniform(1.6, 2.2, n_programs)
    partner_move = rng.choice([-1.0, 1.0], n_programs) * rng.uniform(0.8, 1.2, n_programs)
    members = {p: rng.permutation(panel[genes.program[panel] == p]).tolist() for p in order.tolist()}
    n_used = min(n_programs, max(1, n_strong // 2))
    used = [p for p in order.tolist() if len(members[p]) >= 2][:n_used]
    targets: list[int] = []
    while len(targets) < n_strong:
        ready = [p for p in used if members[p]] or [p for p in order.tolist() if members[p]]
        if not ready:
            raise ValueError(
                f"perturbations: {n_strong} strong ones need as many program genes in the screen's panel, "
                "which has "
                f"{len(targets)}; ask for fewer perturbations or more genes"
            )
        targets += [members[p].pop() for p in ready[: n_strong - len(targets)]]
    idle = np.setdiff1d(panel[genes.program[panel] < 0], targets)
    targets += rng.choice(idle, config.perturbations - n_strong, replace=False).tolist()
    shift = np.zeros((1 + len(targets), n_programs))
    for row, target in enumerate(targets[:n_strong], start=1):
        p = genes.program[target]
        shift[row, partner[p]] += partner_move[p]
        shift[row, p] += move[p]
    is_strong = np.arange(1 + len(targets)) <= n_strong
    is_strong[0] = False
    names = (CONTROL, *genes.symbols[targets])
    return Perturbations(names, np.array([-1, *targets]), is_strong, shift)


def _make_dataset(
    rng: np.random.Generator,
    number: int,
    name: str,
    n_obs: int,
    panel: np.ndarray,
    types: dict[str, np.ndarray],
    perturbations: Perturbations | None,
) -> Dataset:
    traits = _TRAITS[name]
    batches = tuple(f"{name}_b{b + 1}" for b in range(traits.batches))
    slots = np.zeros(1, np.int64)
    if perturbations is not None:
        n = len(perturbations.names)
        slots = rng.permutation(np.concatenate([np.zeros(max(1, n // 4), np.int64), np.arange(1, n)]))
    return Dataset(
        name=name,
        number=number,
        n_obs=n_obs,
        modality="bulk" if name == "sim_bulk" else "sc",
        panel=panel,
        types=tuple(types),
        activity=np.stack(list(types.values())),
        type_slots=_uneven_slots(rng, len(types)),
        batches=batches,
        batch_slots=_uneven_slots(rng, len(batches)),
        batch_shift=rng.normal(0.0, 0.15, (len(batches), len(panel))),
        batch_depth=rng.lognormal(0.0, 0.15, len(batches)),
        depth=min(traits.depth_per_gene * len(panel), traits.depth_limit),
        depth_sd=traits.depth_sd,
        activity_sd=traits.activity_sd,
        overdispersion=traits.overdispersion,
        perturbations=perturbations,
        perturbation_slots=slots,
    )


def _uneven_slots(rng: np.random.Generator, n_labels: int) -> np.ndarray:
    """Labels in a fixed random order, the commonest about three times as frequent as the rarest."""
    share = rng.uniform(0.5, 1.5, n_labels)
    edges = np.cumsum(share) / share.sum()
    return rng.permutation(np.minimum(np.searchsorted(edges, (np.arange(_SLOTS) + 0.5) / _SLOTS), n_labels - 1))
