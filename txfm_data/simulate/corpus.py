"""A simulated corpus on disk: its datasets, gene pairs and the truth behind the counts."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from txfm_data.progress import Progress, ignore
from txfm_data.simulate.config import STATEMENT, SimulationConfig
from txfm_data.simulate.design import BLOCK_SAMPLES, CONTROL, Dataset, Design, Genes, make_design


def simulate_corpus(
    out: str | Path, config: SimulationConfig | None = None, *, progress: Progress = ignore
) -> dict[str, Any]:
    """Write a simulated corpus into the new folder `out`.

    The folder appears when all of it is written: a run that fails or is stopped leaves nothing behind.

    Parameters
    ----------
    out : folder that does not exist or is empty.
    config : sizes and seed; the defaults of `SimulationConfig` if None.
    progress : called with samples written and samples in all.

    Returns
    -------
    dict, ready for JSON: the datasets with their paths and sizes, the relationship files, the path of
    `truth.json`.

    Raises
    ------
    ValueError
        If `out` is a file or a folder that is not empty.
    """
    from txfm_data.simulate.h5ad import (
        write_h5ad,
    )  # anndata takes a second to import; options and --help need none of it

    design = make_design(config or SimulationConfig())
    total, done = sum(d.n_obs for d in design.datasets), 0
    out = Path(out)
    datasets = []
    with _staged_folder(out) as stage:
        for dataset in design.datasets:
            sizes = {"nnz": 0, "max_count": 0}
            with closing(write_h5ad(stage / f"{dataset.name}.h5ad", design, dataset)) as blocks:
                for block in blocks:
                    sizes["nnz"] += block.counts.nnz
                    sizes["max_count"] = max(sizes["max_count"], int(block.counts.data.max()))
                    done += block.counts.shape[0]
                    progress(done, total)
            datasets.append(_describe(dataset) | sizes | {"path": str(out / f"{dataset.name}.h5ad")})
        pairs = _write_relationships(stage, design)
        _write_truth(stage / "truth.json", design)
    return {
        "out": str(out),
        "simulated": STATEMENT,
        "seed": design.config.seed,
        "genes": len(design.genes),
        "programs": len(design.programs),
        "datasets": datasets,
        "relationships": {str(out / name): n for name, n in pairs.items()},
        "truth": str(out / "truth.json"),
    }


@contextmanager
def _staged_folder(out: Path) -> Iterator[Path]:
    """Make a folder beside `out` that takes its name when the block ends well, and is removed otherwise."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; expected a new or empty folder for the simulated corpus")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: the folder is not empty; give a new one, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield stage
        for path in stage.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        stage.chmod(0o777 & ~_umask())
        os.replace(stage, out)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write_relationships(stage: Path, design: Design) -> dict[str, int]:
    """Write gene pairs as public annotation files do: of one program, and as many decoys across."""
    rng = np.random.default_rng([design.config.seed, 0, 1])
    genes = design.genes
    pairs = np.concatenate(
        [_program_pairs(rng, genes, p, design.config.pairs_per_program) for p in range(len(design.programs))]
    )
    members = np.flatnonzero(genes.program >= 0)
    drawn = np.sort(rng.choice(members, (3 * len(pairs), 2)), axis=1)
    drawn = np.unique(drawn[genes.program[drawn[:, 0]] != genes.program[drawn[:, 1]]], axis=0)
    decoys = rng.permutation(drawn)[: len(pairs)]
    files = {"relationships/SIM_PROGRAMS.txt": pairs, "decoys/SIM_DECOYS.txt": decoys}
    symbols = genes.symbols
    for name, rows in files.items():
        (stage / name).parent.mkdir()
        lines = [f"{symbols[a]},{symbols[b]}\n" for a, b in rows.tolist()]
        (stage / name).write_text("entity1,entity2\n" + "".join(lines), encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


def _program_pairs(rng: np.random.Generator, genes: Genes, program: int, limit: int) -> np.ndarray:
    members = np.flatnonzero(genes.program == program)
    left, right = np.triu_indices(len(members), 1)
    chosen = np.sort(rng.permutation(len(left))[:limit])
    return np.stack([members[left[chosen]], members[right[chosen]]], axis=1)


def _describe(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "n_obs": dataset.n_obs,
        "n_vars": len(dataset.panel),
        "modality": dataset.modality,
        "held_out": dataset.is_held_out,
    }


def _write_truth(path: Path, design: Design) -> None:
    """Write what the counts were drawn from, and the versions: NumPy promises a random stream within one."""
    genes, names = design.genes, design.programs

    def by_program(values: np.ndarray) -> dict[str, float]:
        return {names[p]: round(float(values[p]), 6) for p in np.flatnonzero(values)}

    screen = next(d for d in design.datasets if d.perturbations is not None)
    screened = screen.perturbations
    perturbations = {} if screened is None else {
        name: {"effect": effect, "programs": by_program(shift)}
        for name, effect, shift in zip(screened.names, screened.effects(), screened.shift, strict=True)
        if name != CONTROL
    }  # fmt: skip
    truth = {
        "format": "txfm-simulation",
        "version": 1,
        "simulated": STATEMENT,
        "config": design.config.recorded(),
        "block_samples": BLOCK_SAMPLES,
        "versions": {name: version(name) for name in ("numpy", "scipy", "anndata", "h5py")},
        "machine": platform.machine(),
        "gene_ids": "symbol SIM00001 has the id ENSG99000000001, SIM00002 the id ENSG99000000002, and so on",
        "datasets": {d.name: _describe(d) | {"file": f"{d.name}.h5ad"} for d in design.datasets},
        "held_out": [d.name for d in design.datasets if d.is_held_out],
        "programs": {name: genes.symbols[genes.program == p].tolist() for p, name in enumerate(names)},
        "cell_types": {
            cell_type: by_program(activity)
            for d in design.datasets
            for cell_type, activity in zip(d.types, d.activity, strict=True)
        },
        "control": CONTROL,
        "screen": screen.name,
        "perturbations": perturbations,
    }
    path.write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
