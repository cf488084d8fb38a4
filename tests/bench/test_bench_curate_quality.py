"""The quality rules beside scanpy's filters of the same samples, loading included: time, peak memory, and the same result.

`TXFM_BENCH_SAMPLES=200000 pytest tests/bench/test_bench_curate_quality.py -s` prints the figures at the size of the goal; it
takes 5 GB of disk and, for scanpy, about 15 GB of memory. Each way runs in a process of its own, its imports done.
"""

import hashlib
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

N = int(os.environ.get("TXFM_BENCH_SAMPLES", "2000"))
FROM_SAMPLES = 50_000
"""Below it, opening and starting weigh too much for a ratio to mean anything."""
MIN_CELLS = max(1, N // 200)
"""The paper's 1,000 cells, at 200,000."""
MIN_GENES = 2_240
"""About the median of what the first filter leaves of a simulated sample, so that about half of them are dropped."""
FASTER, MEMORY = 2.0, 0.2


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same samples as an h5ad file and as a store of each backend."""
    from tests.bench.droplets import write_droplets
    from txfm_data import ingest

    folder = tmp_path_factory.mktemp("bench")
    write_droplets(folder / "scanpy", N)
    for backend in ("soma", "zarr"):
        ingest.h5ad(folder / "scanpy", folder / backend, "d", batch="batch", backend=backend)
    return {how: folder / how for how in ("soma", "zarr", "scanpy")}


def test_quality_rules_against_scanpy(sources: dict[str, Path]) -> None:
    from shards.bench.fresh import run_afresh

    found = {
        how: run_afresh(__file__, {"path": str(path), "how": how}, f"filtering by {how}")
        for how, path in sources.items()
    }
    theirs = found["scanpy"]
    print()
    for how, run in found.items():
        faster, memory = theirs["seconds"] / run["seconds"], run["peak_mib"] / theirs["peak_mib"]
        print(f"{how}: {run['seconds']:.2f} s, CPU {run['cpu']:.2f} s, peak {run['peak_mib']:,.0f} MiB", end="; ")
        print(f"{faster:.1f} times as fast as scanpy, in {memory:.3f} of its memory")
    for how in ("soma", "zarr"):
        assert found[how]["kept"] == theirs["kept"]
    assert 0 < theirs["kept"][0] < N and theirs["kept"][1] < 20_000
    if N < FROM_SAMPLES:
        return
    for how in ("soma", "zarr"):
        assert theirs["seconds"] > FASTER * found[how]["seconds"]
        assert found[how]["peak_mib"] < MEMORY * theirs["peak_mib"]


def filter_by_rules(path: str) -> Any:
    """Filter a store; a function that does it, with everything imported."""
    import tempfile

    import numpy as np

    from txfm_data.curate.quality import apply_cells_by_genes, apply_genes_by_cells
    from txfm_data.curate.recipe import CellsByGenes, GenesByCells
    from txfm_data.curate.state import Context, State
    from txfm_data.parallel import Workers, pool
    from txfm_data.store.opening import open_store

    def work() -> tuple[list[str], list[str]]:
        with tempfile.TemporaryDirectory() as folder, pool(Workers()) as running:
            store = open_store(path)
            state = State.of(store, store.datasets)
            context = Context(seed=0, number=1, pool=running, scratch=Path(folder), extras=Path(folder))
            apply_genes_by_cells(GenesByCells(min_cells=MIN_CELLS), state, state.records, context)
            apply_cells_by_genes(CellsByGenes(min_genes=MIN_GENES), state, state.records, context)
        genes = store.vocabulary.gene_ids
        return [f"cell{row}" for row in np.flatnonzero(state.alive)], [genes[token] for token in state.panels["d"]]

    return work


def filter_by_scanpy(path: str) -> Any:
    """Filter an h5ad file; a function that does it, with everything imported."""
    import scanpy as sc

    def work() -> tuple[list[str], list[str]]:
        adata = sc.read_h5ad(path)
        sc.pp.filter_genes(adata, min_cells=MIN_CELLS)
        sc.pp.filter_cells(adata, min_genes=MIN_GENES)
        return list(adata.obs_names), list(adata.var_names)

    return work


def measure(path: str, how: str) -> dict[str, Any]:
    """Seconds, CPU seconds, peak MiB of this process, and what was kept: numbers of samples and genes, digest of their names."""
    work = filter_by_scanpy(path) if how == "scanpy" else filter_by_rules(path)
    since, cpu = time.perf_counter(), time.process_time()
    samples, genes = work()
    seconds, cpu = time.perf_counter() - since, time.process_time() - cpu
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert peak is not None
    names = hashlib.sha256("\n".join([*samples, "", *genes]).encode()).hexdigest()
    kept = [len(samples), len(genes), names]
    return {"seconds": seconds, "cpu": cpu, "peak_mib": int(peak[1]) / 1024, "kept": kept}


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    warnings.simplefilter("ignore")
    sys.stdout.write(json.dumps(measure(**json.loads(sys.argv[1]))) + os.linesep)
