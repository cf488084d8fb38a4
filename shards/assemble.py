"""What a corpus has besides its shards, from the sums of pass 1 and the shards of pass 2: tables and manifest."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from shards import gather, spill
from shards import manifest as mf
from shards.shuffle import BuildPlan
from shards.spill import Spill
from shards.staging import Stage
from shards.tar import file_entry, sync
from txfm_data.panels import Panels, make_panels, write_panels
from txfm_data.vocabulary import GeneStatistics, write_vocabulary


def is_weighted(plan: BuildPlan) -> bool:
    """Whether an epoch leaves samples out, so that readers must know which samples there are."""
    return min(plan.weights) < 1


def write_tables(
    plan: BuildPlan, stage: Stage, spills: list[Spill], splits: dict[str, tuple[mf.ShardEntry, ...]]
) -> mf.Manifest:
    """Write all tables of a corpus beside its shards, to disk; the manifest that names everything."""
    statistics, panels = _statistics(plan, stage.spills, spills)
    write_vocabulary(stage.shards / mf.VOCABULARY, plan.chosen.vocabulary, statistics)
    write_panels(stage.shards / mf.PANELS, panels)
    names = [mf.VOCABULARY, mf.PANELS]
    if is_weighted(plan):
        _write_train_samples(stage, [shard.name for shard in splits["train"]])
        names.append(mf.TRAIN_SAMPLES)
    for name in names:
        sync(stage.shards / name)
    config = plan.config
    return mf.Manifest(
        target_sum=config.target_sum, seed=config.seed, lanes=plan.lanes, mix_blocks=config.mix_blocks,
        block_rows=config.block_rows, n_genes=len(plan.chosen.vocabulary),
        vocabulary_sha256=plan.chosen.vocabulary.fingerprint,
        filter={"min_cells": config.min_cells, "min_cell_fraction": config.min_cell_fraction},
        selection=None if plan.chosen.selection is None else plan.chosen.selection.sha256, obs_columns=plan.obs_columns,
        has_fractions=any(found.has_fractions for found in spills), datasets=dataset_entries(plan),
        files={name: file_entry(stage.shards / name) for name in names}, splits=splits,
    )  # fmt: skip


def dataset_entries(plan: BuildPlan) -> tuple[mf.DatasetEntry, ...]:
    """How each dataset is split, as the manifest says it."""
    samples, entries = plan.samples, []
    for number, record in enumerate(plan.chosen.records):
        part = slice(int(samples.starts[number]), int(samples.starts[number + 1]))
        is_val = samples.is_val[part]
        counts = np.bincount(samples.batch.values[part][~is_val], minlength=len(samples.batch.texts))
        batches = {samples.batch.texts[code]: int(counts[code]) for code in np.flatnonzero(counts).tolist()}
        n_val = int(is_val.sum())
        entries.append(
            mf.DatasetEntry(
                record.name, number, record.modality, len(is_val) - n_val, n_val, samples.held_out[number],
                samples.val_batches[number], record.content_sha256, plan.weights[number], batches,
            )
        )  # fmt: skip
    return tuple(entries)


def _statistics(plan: BuildPlan, folder: Path, spills: list[Spill]) -> tuple[GeneStatistics, Panels]:
    """Statistics of genes, and mean normalised counts per panel, over the train samples.

    Sums are added in the order of tasks, which workers do not change.
    """
    n_genes, panels = len(plan.chosen.vocabulary), plan.chosen.panels
    record_bytes = spill.record_type(plan.fields).itemsize
    measured, nonzero, log_sum = np.zeros(n_genes, np.int64), np.zeros(n_genes), np.zeros(n_genes)
    totals = [np.zeros(len(panel)) for panel in panels]
    for number, found in enumerate(spills):
        dataset = int(plan.tasks[number, 0])
        sums = spill.read_sums(spill.spill_path(folder, number), found, record_bytes)
        nonzero[panels[dataset]] += sums[0]
        totals[dataset] += sums[1]
        log_sum[panels[dataset]] += sums[2]
    means = []
    for dataset, entry in enumerate(dataset_entries(plan)):
        measured[panels[dataset]] += entry.n_train
        means.append(totals[dataset] / max(1, entry.n_train))
    statistics = GeneStatistics(measured, nonzero.astype(np.int64), log_sum / np.maximum(measured, 1))
    return statistics, make_panels(panels, means)


def _write_train_samples(stage: Stage, shards: list[str]) -> None:
    """Write id and dataset of all train samples as one Arrow batch, which readers map; nothing of it is held here."""
    raw = [stage.done / f"{name}.raw" for name in ("sample_id", "dataset")]
    with open(raw[0], "wb") as ids, open(raw[1], "wb") as datasets:
        for name in shards:
            sample_id, dataset = gather.read_ids(stage.done, name)
            ids.write(np.ascontiguousarray(sample_id).tobytes())
            datasets.write(np.ascontiguousarray(dataset).tobytes())
    arrays = [
        pa.Array.from_buffers(
            kind, raw_path.stat().st_size // width, [None, pa.py_buffer(np.memmap(raw_path, mode="r"))]
        )
        for raw_path, kind, width in zip(raw, (pa.int64(), pa.int32()), (8, 4), strict=True)
    ]
    batch = pa.RecordBatch.from_arrays(arrays, names=["sample_id", "dataset"])
    with pa.OSFile(str(stage.shards / mf.TRAIN_SAMPLES), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
