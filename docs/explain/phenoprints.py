"""The figure of phenoprints.md: one simulated screen, whose strong and null perturbations are known, from cells to tau.

    python docs/explain/phenoprints.py

Simulates the screen, embeds it by PCA, computes statistic and null as the page has them, in plain NumPy, and checks that the
library finds the same. Writes phenoprints.png beside this script.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from txfm_data import ingest  # noqa: E402 (a checkout need not be installed)
from txfm_data.curate.consistency import ConsistencyOptions, EmbeddingArray, perturbation_consistency  # noqa: E402
from txfm_data.curate.embedding import make_embedding  # noqa: E402
from txfm_data.curate.figures import draw_curve  # noqa: E402
from txfm_data.curate.recipe import EmbeddingSpec  # noqa: E402
from txfm_data.curate.state import Context, State  # noqa: E402
from txfm_data.parallel import Workers, pool  # noqa: E402
from txfm_data.simulate.config import SimulationConfig  # noqa: E402
from txfm_data.simulate.design import CONTROL, make_design  # noqa: E402
from txfm_data.simulate.h5ad import write_h5ad  # noqa: E402
from txfm_data.store.opening import open_store  # noqa: E402

TAU = 0.1


def simulated_screen(folder: Path) -> tuple[np.ndarray, Any, dict[str, str]]:
    """Embedding (n, 50) float32, labels of its cells, and what each perturbation truly does."""
    dataset = next(d for d in make_design(SimulationConfig()).datasets if d.perturbations)
    for _ in write_h5ad(folder / "screen.h5ad", make_design(SimulationConfig()), dataset):
        pass
    ingest.h5ad(
        folder / "screen.h5ad",
        folder / "store.soma",
        "screen",
        batch="batch",
        perturbation="perturbation",
        control=CONTROL,
    )
    store = open_store(folder / "store.soma")
    with pool(Workers()) as running:
        context = Context(seed=0, number=1, pool=running, scratch=folder, extras=folder)
        path = make_embedding(EmbeddingSpec(kind="pca"), State.of(store, store.datasets), store.datasets[0], context)
    obs = store.obs(["perturbation", "is_control", "batch"]).to_pandas()
    names, effects = dataset.perturbations.names, dataset.perturbations.effects()
    return np.load(path), obs, dict(zip(names, effects, strict=True))


def align(cells: np.ndarray, is_control: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Principal axes of the controls, then each batch standardised by its own."""
    center = cells[is_control].mean(axis=0)
    axes = np.linalg.svd(cells[is_control] - center, full_matrices=False)[2]
    aligned = (cells - center) @ axes.T
    for name in np.unique(batch):
        own = batch == name
        controls = aligned[own & is_control]
        aligned[own] = (aligned[own] - controls.mean(axis=0)) / controls.std(axis=0)
    return aligned


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine of each row of `left` with `right`, or with its rows."""
    return (left * right).sum(axis=-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)


def draw(axes: Any, aligned: np.ndarray, own: np.ndarray, others: np.ndarray, title: str) -> float:
    """Histograms of a perturbation's leave-one-out cosines and of its null; returns its statistic."""
    total = aligned[own].sum(axis=0)
    leave_one_out = cosine(aligned[own], total - aligned[own])
    null = cosine(aligned[others], total)
    statistic = float(leave_one_out.mean())
    bins = np.linspace(-1, 1, 61)
    axes.hist(null, bins, density=True, color="0.75", label="random cells with its mean (null)")
    axes.hist(
        leave_one_out, bins, density=True, histtype="step", color="C0", label="its cells with the sum of its others"
    )
    p = (1 + np.count_nonzero(null >= statistic)) / (1 + len(null))
    axes.axvline(statistic, color="C1", ls="--", label=f"statistic: their mean; p = {p:.3f}")
    axes.set(title=title, xlabel="cosine", ylabel="density")
    axes.legend(fontsize=7, loc="upper left")
    return statistic


def main() -> None:
    """Simulate, test and draw."""
    from matplotlib.figure import Figure

    with tempfile.TemporaryDirectory() as folder:
        embedding, obs, effect = simulated_screen(Path(folder))
    is_control = obs["is_control"].to_numpy(bool)
    names = sorted(set(obs["perturbation"]) - {CONTROL})
    group = np.array([names.index(name) if name != CONTROL else -1 for name in obs["perturbation"]], np.int32)
    batch = np.unique(obs["batch"].astype(str), return_inverse=True)[1]
    shuffled = group.copy()
    shuffled[group >= 0] = np.random.default_rng(0).permutation(group[group >= 0])

    def test(labels: np.ndarray) -> Any:
        cells = EmbeddingArray(embedding)
        return perturbation_consistency(
            cells, labels, is_control, batch, ConsistencyOptions(), n_perturbations=len(names)
        )

    found, by_chance = test(group), test(shuffled)
    is_strong = np.array([effect[name] == "strong" for name in names])
    aligned = align(embedding.astype(np.float64), is_control, batch)

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, which, title in (
        (panels[0, 0], is_strong, "A strong perturbation"),
        (panels[0, 1], ~is_strong, "One without effect"),
    ):
        g = int(np.flatnonzero(which)[0])
        statistic = draw(
            axes, aligned, group == g, (group >= 0) & (group != g), f"{title} ({np.count_nonzero(group == g)} cells)"
        )
        if abs(statistic - found.statistic[g]) > 1e-4:
            raise ValueError(
                f"{names[g]}: the library finds {found.statistic[g]}, the page's formula gives {statistic}"
            )
    axes = panels[1, 0]
    kinds = {"strong": found.p[is_strong], "no effect": found.p[~is_strong], "labels shuffled": by_chance.p}
    for height, (p, color) in enumerate(zip(kinds.values(), ("C0", "C3", "0.6"), strict=True)):
        axes.plot(np.sort(p), height + np.linspace(-0.25, 0.25, len(p)), "o", ms=4, color=color)
        axes.text(1.0, height, f"{np.count_nonzero(p < TAU)} of {len(p)} kept", ha="right", va="center", fontsize=8)
    axes.axvline(TAU, color="C1", ls="--")
    axes.set(title=f"p of every perturbation; tau = {TAU:g}", xlabel="p", xlim=(0, 1.02))
    axes.set_yticks(range(len(kinds)), list(kinds))
    order = np.argsort(found.p)
    cells = np.concatenate([[0], np.cumsum(found.n_cells[order])]) + np.count_nonzero(is_control)
    draw_curve(panels[1, 1], found.p[order], cells, TAU)
    panels[1, 1].set_title("What each tau keeps")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "phenoprints.png", dpi=90, metadata={"Software": None})
    print(f"{np.count_nonzero(found.p[is_strong] < TAU)} of {is_strong.sum()} strong perturbations kept, "
          f"{np.count_nonzero(found.p[~is_strong] < TAU)} of {(~is_strong).sum()} without effect")  # fmt: skip


if __name__ == "__main__":
    main()
