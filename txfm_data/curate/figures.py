"""Figures of a curation. The same values give the same bytes: no date, a fixed size and no window system."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 50
_DPI = 120


def plot_phenoprints(
    path: Path, *, title: str, p: np.ndarray, cells: np.ndarray, tau: float, n_asked: int | None = None, n_untestable: int = 0
) -> None:  # fmt: skip
    """Draw what each tau would keep, and the p-values, as PNG.

    title : of the figure.  p : (n,) float64, ascending, of the perturbations that could be tested.
    cells : (n + 1,) integers, cells kept with so many of them, controls included.
    tau : that was taken.  n_asked : cells that tau was calibrated to.  n_untestable : perturbations without a p.
    """
    from matplotlib.figure import Figure  # takes a moment to import, and only figures need it

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    figure.suptitle(title, parse_math=False)
    left, right = figure.subplots(1, 2)
    draw_curve(left, p, cells, tau, n_asked)
    right.hist(p, bins=np.linspace(0, 1, _BINS + 1), color="0.6")
    right.axvline(tau, color="C1", ls="--")
    untested = f" ({n_untestable:,} not testable)" if n_untestable else ""
    right.set(xlabel="p", ylabel=f"perturbations{untested}", xlim=(0, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def draw_curve(axes: "Axes", p: np.ndarray, cells: np.ndarray, tau: float, n_asked: int | None = None) -> None:
    """Draw the cells that are kept against tau on axes of matplotlib; arguments as of `plot_phenoprints`."""
    kept = int(np.searchsorted(p, tau, side="left"))
    axes.step([0.0, *p.tolist(), 1.0], [*cells.tolist(), int(cells[-1])], where="post", color="C0")
    axes.axvline(tau, color="C1", ls="--")
    axes.plot(
        tau, cells[kept], "o", color="C1", label=f"tau {tau:g}: {kept:,} perturbations, {int(cells[kept]):,} cells"
    )
    if n_asked is not None:
        axes.axhline(n_asked, color="0.5", ls=":", label=f"asked for: {n_asked:,} cells")
    axes.set(xlabel="tau", ylabel="cells kept, controls included", xlim=(0, 1), ylim=(0, None))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(fontsize=8, loc="lower right")
