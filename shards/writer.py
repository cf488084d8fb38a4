"""Store to shards: plan, spill, gather, manifest last, rename. All or nothing, and a build that was killed goes on.

What is expensive happens in `shards.scatter` (pass 1) and `shards.gather` (pass 2), on as many workers as there are; what is
here runs once.
"""

import logging
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards import assemble, gather, scatter, spill
from shards import manifest as mf
from shards.codec import BlockSchema
from shards.gather import Gather, ShardTask
from shards.needs import Memory, check_disk, check_samples, plan_memory
from shards.samples import obs_kinds
from shards.scatter import Scatter
from shards.select import ShardConfig, select
from shards.shuffle import BuildPlan, make_plan
from shards.spill import Spill
from shards.staging import Stage
from shards.tar import sync, write_synced
from shards.target import Target
from txfm_data.parallel import Pool, Workers, pool
from txfm_data.progress import Progress, ignore

if TYPE_CHECKING:  # a machine that only trains has no tiledbsoma
    from txfm_data.store.protocol import Store

_log = logging.getLogger(__name__)


def build_shards(
    store: "Store",
    out: str | Path,
    config: ShardConfig,
    *,
    workers: Workers | None = None,
    scratch: str | Path | None = None,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Write a shard corpus from a store.

    out : a folder that must not exist yet, or be empty; or an address on object storage.
    workers : where it is worked on, and the memory that all of it may use.
    scratch : folder in which it is built; by default beside `out`, or for object storage a temporary one.
    progress : called with samples done of all; each counts twice, once for each pass.

    Returns
    -------
    dict
        out, n_genes, n_train, n_val, shards, blocks, bytes, bytes_per_sample, lanes, fingerprint, datasets, spill_bytes,
        resumed, seconds.

    Raises
    ------
    ValueError
        If what is asked for is not there, leaves nothing to train on, or does not fit the memory budget.
    FileExistsError
        If `out` holds something.
    OSError
        If a disk is full, or object storage does not answer. The same call goes on where it stopped.
    """
    started_s = time.monotonic()
    workers = Workers() if workers is None else workers
    target = Target(out, scratch)
    plan, memory = _plan(store, config, workers)
    check_disk(plan, target.folder, target.name)
    # The pool first: a scheduler that does not answer is no reason to remove what an earlier run left
    with pool(workers) as running, target.stage(plan.key) as stage:
        if stage.is_resumed:
            _log.info("%s: going on with what an earlier run left in %s", target.name, stage.folder)
        steps = _Steps(progress, 2 * len(plan.samples))
        spills = _scatter(store, plan, stage, running, steps)
        splits = _gather(plan, stage, spills, memory, running, steps)
        _keep_only(stage.shards, [shard.name for split in mf.SPLITS for shard in splits[split]])
        manifest = assemble.write_tables(plan, stage, spills, splits)
        write_synced(stage.shards / mf.MANIFEST, manifest.to_json().encode())
        sync(stage.shards)
        result = _result(plan, mf.Corpus(stage.shards))
        target.publish(stage.shards)
        spill_bytes = sum(found.n_bytes for found in spills)
        resumed = stage.is_resumed
    seconds = time.monotonic() - started_s
    return {"out": target.name, **result, "spill_bytes": spill_bytes, "resumed": resumed, "seconds": seconds}


def plan_shards(
    store: "Store",
    out: str | Path,
    config: ShardConfig,
    *,
    workers: Workers | None = None,
    scratch: str | Path | None = None,
) -> dict[str, Any]:
    """Say what `build_shards` would read, write and need, without reading counts or writing anything.

    Raises
    ------
    ValueError, FileExistsError
        Where `build_shards` would.
    """
    target = Target(out, scratch)
    plan, memory = _plan(store, config, Workers() if workers is None else workers)
    check_disk(plan, target.folder, target.name)
    return {
        "out": target.name, "dry_run": True, "store": store.path, "n_genes": len(plan.chosen.vocabulary),
        "n_train": plan.splits[0].n_samples, "n_val": plan.splits[1].n_samples,
        "shards": sum(split.n_shards for split in plan.splits), "blocks": sum(len(split.block_samples) for split in plan.splits),
        "lanes": plan.lanes, "bytes_estimated": plan.n_bytes, "bytes_per_sample_estimated": plan.bytes_per_sample,
        "spill_bytes_estimated": plan.spill_bytes, "memory_bytes": memory.total, "read_tasks": len(plan.tasks),
        "stage": str(target.folder), "obs_columns": plan.obs_columns, "datasets": _datasets(plan, assemble.dataset_entries(plan)),
    }  # fmt: skip


def _plan(store: "Store", config: ShardConfig, workers: Workers) -> tuple[BuildPlan, Memory]:
    chosen = select(store, config)
    n = sum(r.n_obs for r in chosen.records) if chosen.selection is None else len(chosen.selection.sample_id)
    check_samples(n, list(obs_kinds(store, config.obs_columns).values()), workers.memory)
    plan = make_plan(store, chosen, config)
    return plan, plan_memory(plan, workers)


class _Steps:
    """Samples done of all, over both passes."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def add(self, n: int) -> None:
        self._done += n
        self._progress(self._done, self._total)


def _scatter(store: "Store", plan: BuildPlan, stage: Stage, workers: Pool, steps: _Steps) -> list[Spill]:
    """Pass 1, as far as an earlier run has not done it; the spills of all tasks."""
    work = Scatter(
        secrets.token_hex(8), store.path, plan.store_datasets, plan.chosen.store_tokens, plan.fields,
        (plan.splits[0].cuts, plan.splits[1].cuts), plan.config.seed, plan.config.target_sum, stage.spills,
    )  # fmt: skip
    waiting, there = scatter.pending(stage.spills, len(plan.tasks))
    if there:
        steps.add(sum(sum(found.n_samples) for found in there.values()))
    with work.lend(store):
        for number, n in workers.run(work, plan.read_tasks(waiting)):
            found = spill.finished_spill(spill.spill_path(stage.spills, number))
            if found is None:
                raise spill.damaged(spill.spill_path(stage.spills, number))
            there[number] = found
            steps.add(n)
    return [there[number] for number in range(len(plan.tasks))]


def _gather(
    plan: BuildPlan, stage: Stage, spills: list[Spill], memory: Memory, workers: Pool, steps: _Steps
) -> dict[str, tuple[mf.ShardEntry, ...]]:
    """Pass 2, as far as an earlier run has not done it; the shards of each split."""
    texts = {
        column.name: column.texts for column in (plan.samples.batch, *plan.samples.columns) if column.kind == "string"
    }
    gather.write_texts(stage.texts, texts)
    work = Gather(
        secrets.token_hex(8), stage.spills, stage.shards, stage.done, plan.fields, stage.texts, _schema(plan, spills),
        memory.group_bytes, assemble.is_weighted(plan), np.array([found.n_words for found in spills], np.int64),
    )  # fmt: skip
    entries: dict[tuple[str, int], mf.ShardEntry] = {}
    for split in plan.splits:
        for number in range(split.n_shards):
            name = mf.file_name(split.name, number)
            found = gather.finished_shard(stage.shards, stage.done, name, with_ids=work.with_ids)
            if found is not None:
                entries[split.name, number] = found
    if entries:
        steps.add(sum(entry.samples for entry in entries.values()))
    tasks = _shard_tasks(plan, spills, set(entries))
    try:
        for entry, of_split, number in workers.run(work, tasks):
            entries[of_split, number] = entry
            steps.add(entry.samples)
    finally:
        gather.close()
    return {split.name: tuple(entries[split.name, number] for number in range(split.n_shards)) for split in plan.splits}


def _schema(plan: BuildPlan, spills: list[Spill]) -> BlockSchema:
    n = len(plan.chosen.records)
    return BlockSchema(
        len(plan.chosen.vocabulary), n, n, plan.chosen.vocabulary.fingerprint, any(found.has_fractions for found in spills),
        plan.obs_columns,
    )  # fmt: skip


def _shard_tasks(plan: BuildPlan, spills: list[Spill], there: set[tuple[str, int]]) -> Iterator[ShardTask]:
    """The shards that are not there yet, and where their samples are in the spills."""
    for at, split in enumerate(plan.splits):
        for number in range(split.n_shards):
            if (split.name, number) in there:
                continue
            columns = [
                (of, found.rows[at][number], found.rows[at][number + 1], found.words[at][number], found.crc[at][number])
                for of, found in enumerate(spills)
                if found.rows[at][number + 1] > found.rows[at][number]
            ]
            low, high = split.shard_blocks[number : number + 2]
            slices = np.array(columns, np.int64).reshape(-1, 5)
            yield ShardTask(split.name, number, split.block_samples[low:high], slices)


def _keep_only(folder: Path, names: list[str]) -> None:
    """Remove what else is there: pieces that a process left when it was killed."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def _result(plan: BuildPlan, corpus: mf.Corpus) -> dict[str, Any]:
    shards = [shard for split in mf.SPLITS for shard in corpus.shards(split)]
    n_bytes, n = sum(s.bytes for s in shards), sum(s.samples for s in shards)
    return {
        "n_genes": len(corpus.vocabulary), "n_train": corpus.n_samples("train"), "n_val": corpus.n_samples("val"),
        "shards": len(shards), "blocks": sum(len(s.blocks) for s in shards), "bytes": n_bytes, "bytes_per_sample": n_bytes / n,
        "lanes": corpus.lanes, "fingerprint": corpus.fingerprint, "datasets": _datasets(plan, corpus.manifest.datasets),
    }  # fmt: skip


def _datasets(plan: BuildPlan, entries: tuple[mf.DatasetEntry, ...]) -> list[dict[str, Any]]:
    return [
        {"name": d.name, "n_genes": len(plan.chosen.panels[d.panel_id]), "n_train": d.n_train, "n_val": d.n_val,
         "held_out": d.held_out, "val_batches": list(d.val_batches), "weight": d.weight, "n_batches": len(d.batches)}
        for d in entries
    ]  # fmt: skip
