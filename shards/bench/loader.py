"""The masked stream of a corpus beside its parts alone, their floors, and annbatch: what `txfm bench loader` measures."""

import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shards.bench.fresh import Request, stream_afresh
from shards.bench.goals import goals
from shards.bench.in_memory import InMemory
from shards.bench.peer import Peer
from shards.bench.rounds import Rate, Work, alternate, timed
from shards.manifest import Corpus
from shards.reader import train_batches
from txfm_data.progress import Progress, ignore

ROWS = {
    "draw": "draw {k:,} genes",
    "draw_floor": "  its floor",
    "mask": "normalise and mask, in memory",
    "mask_floor": "  its floor (full_lut)",
    "mask_numpy": "  in NumPy",
    "decode": "decode, in memory",
    "decode_mask": "decode and mask, in memory",
    "raw": "raw stream, shuffled",
    "masked": "masked stream",
    "annbatch": "annbatch, sparse",
}
"""Rows of the table, and how each is called."""

_PACKAGES = ("torch", "numpy", "numba", "pyarrow", "webdataset")
_PACED_S = 0.03


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How loaders are measured."""

    batch: int = 512  # samples of a global batch
    n_unmasked: int = 2_048  # genes shown
    rounds: int = 5  # measured, after one that warms up
    threads: int | None = None  # that read and decode
    n_paced: int = 200  # batches that a steady consumer takes, one every 30 ms
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "n_unmasked", "rounds", "n_paced"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def bench_loader(
    corpus: Corpus,
    config: LoaderConfig,
    *,
    annbatch: Sequence[str] = (),
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Measure everything on one corpus, in rounds that alternate.

    annbatch : command that runs epochs of annbatch over the same samples (tools/annbatch_epoch.py), or nothing.

    Returns
    -------
    dict
        corpus, settings, machine, rows (one each of `ROWS`), goals, notes: as JSON can hold it.

    Raises
    ------
    ValueError
        If lanes and batch do not fit, or a process that was started fails.
    """
    notes: list[str] = []
    request = Request(
        shards=str(corpus.address), batch=config.batch, n_unmasked=config.n_unmasked, seed=config.seed, threads=config.threads,
        interval_s=_PACED_S, n_paced=config.n_paced,
    )  # fmt: skip
    kernels = InMemory(corpus, batch=config.batch, n_unmasked=config.n_unmasked, seed=config.seed)
    works: dict[str, Work] = {name: timed(run) for name, run in kernels.works.items()}
    works |= _streams(corpus, config)
    about = _about(corpus)
    with ExitStack() as stack:
        if annbatch:
            peer = stack.enter_context(Peer("annbatch", annbatch))
            works["annbatch"] = peer.epoch
        rates = alternate(works, config.rounds, progress)
        if annbatch:
            notes += _differences(about, peer)
            about["annbatch"] = peer.hello.get("versions", {})
    found = stream_afresh(request)
    no_peer = "" if annbatch else "annbatch was not run (--annbatch-python)"
    rows = [_row(name, config, rates.get(name), no_peer) for name in ROWS]
    return {
        "kind": "loader", "corpus": about, "settings": asdict(config), "machine": _machine(), "rows": rows,
        "goals": [asdict(goal) | {"is_met": goal.is_met} for goal in goals(rates, found, about["bytes_per_sample"], no_peer)],
        "notes": notes,
    }  # fmt: skip


def _streams(corpus: Corpus, config: LoaderConfig) -> dict[str, Work]:
    from shards.stream import MaskedStream  # it needs torch

    stream = MaskedStream(
        corpus, seed=config.seed, global_batch=config.batch, n_unmasked=config.n_unmasked, threads=config.threads
    )

    def raw(number: int) -> int:
        batches = train_batches(
            corpus, seed=config.seed, epoch=number, global_batch=config.batch, threads=config.threads
        )
        return sum(len(batch) for batch in batches)

    def masked(number: int) -> int:
        return sum(len(batch) for batch in stream.epoch(number))

    return {"raw": timed(raw), "masked": timed(masked)}


def _about(corpus: Corpus) -> dict[str, Any]:
    shards, n_samples = corpus.shards("train"), corpus.n_samples("train")
    return {
        "address": str(corpus.address), "samples": n_samples, "genes": len(corpus.vocabulary), "shards": len(shards),
        "blocks": sum(len(shard.blocks) for shard in shards), "lanes": corpus.lanes, "mix_blocks": corpus.manifest.mix_blocks,
        "nonzero": float(corpus.statistics.n_nonzero.sum()) / max(1, n_samples),
        "bytes_per_sample": sum(shard.bytes for shard in shards) / max(1, n_samples), "fingerprint": corpus.fingerprint,
    }  # fmt: skip


def _differences(about: dict[str, Any], peer: Peer) -> list[str]:
    """Say so if annbatch did not read the same samples."""
    same = peer.samples == about["samples"] and abs(peer.nonzero - about["nonzero"]) < 0.02 * about["nonzero"]
    found = f"annbatch read {peer.samples:,} samples of {peer.nonzero:,.0f} non-zero counts, these shards hold "
    return [] if same else [f"{found}{about['samples']:,} of {about['nonzero']:,.0f}: ratios compare different data"]


def _row(name: str, config: LoaderConfig, rate: Rate | None, why: str) -> dict[str, Any]:
    label = ROWS[name].format(k=config.n_unmasked)
    if rate is None:
        return {
            "name": name,
            "label": label,
            "samples_per_s": None,
            "samples_per_cpu_s": None,
            "rounds": [],
            "why": why,
        }
    return {
        "name": name, "label": label, "samples_per_s": rate.per_s, "samples_per_cpu_s": rate.per_cpu_s,
        "rounds": list(rate.rounds_per_cpu_s), "why": "",
    }  # fmt: skip


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "system": platform.platform(),
        "python": platform.python_version(), **{name: _version(name) for name in _PACKAGES},
    }  # fmt: skip


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
