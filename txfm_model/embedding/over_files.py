"""From a file, store or shard corpus to a file of results: computed in parts on all processes, written whole or not at all."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from txfm_data.progress import Progress, ignore
from txfm_model.embedding.encoding import EncodeOptions, check_options, n_views, over_samples, resolve_precision
from txfm_model.embedding.inputs import InputOptions, open_input
from txfm_model.embedding.processes import Processes
from txfm_model.embedding.samples import Part, SampleInput
from txfm_model.embedding.staging import compute_parts, computed_parts, staged
from txfm_model.model import TxFM

if TYPE_CHECKING:
    from txfm_data.anndata_out import Matrix
    from txfm_model.embedding.encoding import Compute


_PANELS_SAID = 20
"""Datasets of which a log says how many genes are shown."""


def say_nothing(text: str) -> None:
    """Tell nobody: the default of calls that have something to say."""


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How files are read and written.

    reading : how the input is read.  empty_samples : refuse samples without any count, or give them NaN.
    dtype : of the result.  model_name : said in uns, beside what the checkpoint knows of itself.
    processes : those of a launcher; by default as the environment says.
    progress : called in samples of this process.  say : called with what a person should know.
    """

    reading: InputOptions = InputOptions()
    empty_samples: Literal["error", "nan"] = "error"
    dtype: Literal["float32", "float16"] = "float32"
    model_name: str = ""
    processes: Processes | None = None
    progress: Progress = ignore
    say: Callable[[str], None] = say_nothing


Write = Callable[[SampleInput, Path, "Matrix", dict[str, Any]], None]
"""Writes (input, path beside the output, computed matrix, provenance)."""


def run_file(
    model: TxFM,
    source: str | Path,
    out: str | Path,
    *,
    element: str,
    width: int,
    compute: "Compute",
    options: EncodeOptions,
    files: FileOptions,
    write: Write,
) -> dict[str, Any]:
    """Compute a row of `width` values for each sample of `source` and have them written as `element` of `out`.

    Returns
    -------
    dict
        out, n_obs, width, layer, views, counts of genes and of samples without counts; empty but for the first process.

    Raises
    ------
    FileExistsError, FileNotFoundError, ValueError, OSError
        With nothing left at `out` or beside it.
    """
    from txfm_data.anndata_out import Matrix, output_format

    out, dtype = Path(out), np.dtype(files.dtype)
    suffix = output_format(out)
    if out.exists():
        raise FileExistsError(f"{out}: exists already; name another --out, or remove it first")
    check_options(model, options)
    processes = files.processes or Processes()
    with processes.together():
        opened = open_input(source, model.vocabulary, files.reading)
        try:
            _say_genes(opened, options, files.say)
            with staged(out, processes) as folder:

                def compute_part(part: Part, progress: Progress) -> np.ndarray:
                    _check_sizes(opened, part, files.empty_samples)
                    return over_samples(model, part, opened.panels, options, width, compute, progress)

                compute_parts(opened, folder, processes, compute_part, dtype, files.progress)
                if processes.rank > 0:
                    processes.wait_for("written")
                    processes.part("left")
                    return {}
                counted = _CountedRows()
                rows = counted.of(computed_parts(opened, folder, processes, width, dtype))
                about = _provenance(model, opened, options, files)
                path = folder / f"out.{suffix}"
                files.say(f"writing {out}")
                write(opened, path, Matrix(element=element, width=width, dtype=dtype, parts=rows), about)
                _publish(path, out)
                processes.publish("written")
            processes.part("left")
            return {
                "out": str(out), "kind": opened.kind, "n_obs": opened.n_obs, "width": width, "layer": options.layer,
                "views": about["views"], "genes_matched": about["genes_matched"], "genes_in_file": about["genes_in_file"],
                "genes_shown": about["genes_shown"], "n_without_counts": counted.n_empty, "processes": processes.size,
            }  # fmt: skip
        finally:
            opened.close()


class _CountedRows:
    """Counts the rows without values on their way to the file."""

    def __init__(self) -> None:
        self.n_empty = 0

    def of(self, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for part in parts:
            self.n_empty += int(np.isnan(part).any(axis=1).sum())
            yield part


def _say_genes(opened: SampleInput, options: EncodeOptions, say: Callable[[str], None]) -> None:
    say(f"matched {opened.about['genes_matched']:,} of {opened.about['genes_in_file']:,} genes")
    for panel in opened.panels[:_PANELS_SAID]:
        if len(panel.shown) < len(panel.measured):
            say(f"{panel.name}: showing {len(panel.shown):,} of the {len(panel.measured):,} matched genes")
        if options.n_unmasked is not None and options.n_unmasked >= len(panel.shown):
            once = f", in one view in place of {options.views}" if options.views > 1 else ""
            say(
                f"{panel.name}: all of its {len(panel.shown):,} genes are shown, for n_unmasked is {options.n_unmasked:,}{once}"
            )


def _check_sizes(opened: SampleInput, part: Part, empty_samples: str) -> None:
    """Refuse library sizes that are none; sizes of zero unless they were said to be expected."""
    bad = ~(np.isfinite(part.library_size) & (part.library_size >= 0))
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            f"{opened.where}: {opened.name_of(part.start + at)} has the library size {part.library_size[at]}, expected a number "
            "above 0; ingest its dataset again with its library size"
        )
    empty = part.library_size == 0
    if empty.any() and empty_samples == "error":
        raise ValueError(
            f"{opened.where}: {opened.name_of(part.start + int(np.argmax(empty)))} has no count at all, so no library size; pass "
            "--empty-samples nan to give such samples NaN"
        )


def _provenance(model: TxFM, opened: SampleInput, options: EncodeOptions, files: FileOptions) -> dict[str, Any]:
    """What uns says of the result: plain values."""
    shown = [len(panel.shown) for panel in opened.panels]
    views = max(n_views(options, panel) for panel in opened.panels)
    device = model.head.weight.device
    return {
        "model": files.model_name, "vocabulary_sha256": model.vocabulary.fingerprint, "input": opened.kind, **opened.about,
        "genes_shown": max(shown), "genes_shown_least": min(shown), "min_cell_fraction": files.reading.min_cell_fraction,
        "n_unmasked": options.n_unmasked or "all shown", "views": views, "seed": options.seed,
        "temperature": options.temperature, "layer": options.layer, "precision": resolve_precision(options.precision, device),
        "target_sum": model.config.target_sum, "preprocessing": model.config.preprocessing,
        **{f"model_{key}": str(value) for key, value in model.provenance.items() if isinstance(value, str | int | float)},
    }  # fmt: skip


def _publish(path: Path, out: Path) -> None:
    """Give what was written its name."""
    if out.exists():
        raise FileExistsError(f"{out}: was made meanwhile by another program; name another --out")
    os.replace(path, out)
    handle = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
