"""Runs epochs of annbatch's loader for `txfm bench loader`, by the interpreter in which annbatch is installed.

It imports nothing of this project. One JSON object a line: on stdin ``{"epoch": 3}``, on stdout what was found; the first
line on stdout names the versions.
"""

import importlib.metadata
import json
import sys
import time
import warnings

PACKAGES = ("annbatch", "zarr", "zarrs", "anndata", "numpy", "scipy")
COLUMNS = ("batch", "cell_idx")  # of obs that batches carry, where there are such
CHUNK_SIZE, PRELOAD_NCHUNKS = 512, 32  # its defaults, which were its best setting


def main() -> None:
    """Serve epochs until stdin ends."""
    collection, batch_size = sys.argv[1], int(sys.argv[2])
    warnings.filterwarnings("ignore")
    import anndata as ad
    import zarr
    from annbatch import DatasetCollection, Loader  # type: ignore[import-not-found]

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})

    def load(group):
        obs = ad.io.read_elem(group["obs"])
        carried = [name for name in COLUMNS if name in obs]
        return ad.AnnData(X=ad.io.sparse_dataset(group["X"]), obs=obs[carried])

    loader = Loader(
        batch_size=batch_size, chunk_size=CHUNK_SIZE, preload_nchunks=PRELOAD_NCHUNKS, shuffle=True, preload_to_gpu=False
    )  # fmt: skip
    loader = loader.use_collection(DatasetCollection(collection), load_adata=load)
    say({"versions": {name: importlib.metadata.version(name) for name in PACKAGES}})
    for line in sys.stdin:
        samples = nonzero = 0
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in loader:
            samples += batch["X"].shape[0]
            nonzero += batch["X"].nnz
        spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        say({**json.loads(line), "samples": samples, "nonzero": nonzero, **spent})


def say(answer: dict) -> None:
    """Write one line."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
