"""Checkpoints of a run: all that is needed to go on with it, in OUT/checkpoints/step-NNNNNNNN/ (docs/format_checkpoint.md).

Each is a TxFM checkpoint with optimizer.safetensors and resume.json beside. It is written under a hidden name, synced, renamed,
and read back from the disk before an older one may go. No random state is kept: order, masks and stochastic
depth are functions of seed, epoch and sample.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from txfm_model import checkpoint
from txfm_model.config import TrainConfig, config_to_dict
from txfm_model.disk import check_room, drop_cache, file_size, full_disk_is_named, only_writer
from txfm_model.model import TxFM
from txfm_model.optimizer_state import check_optimizer_tensors
from txfm_model.provenance import without_secrets

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
OPTIMIZER, RESUME = "optimizer.safetensors", "resume.json"
FILES = (*checkpoint.FILES, OPTIMIZER)
"""What resume.json names, with sizes and checksums."""
FORMAT, FORMAT_VERSION = "txfm-run-state", 1
WINDOW = "window/"
"""Start of the names of the log window's tensors in optimizer.safetensors."""
MAY_DIFFER = frozenset(
    {
        "shards", "out", "resume", "dry_run", "loop.accumulation", "loop.precision", "loop.validate_every", "loop.log_every",
        "loop.num_processes_expected", "loop.cpu_threads", "loop.checkpoint_every", "loop.keep_checkpoints",
        "loop.activation_checkpointing", "loop.compile",
    }
)  # fmt: skip
"""Settings of a run that do not change what it computes beyond rounding, or not at all."""
_NAME = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.step-(\d{8,})\.[0-9a-f]{8}\.(partial|replaced|removed)")
_FIELDS: dict[str, type] = {
    "step": int, "stream": dict, "training": dict, "corpus_fingerprint": str, "layout": dict, "progress": dict, "files": dict,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run is, besides its weights and its optimizer.

    step : optimizer steps done.  stream : state of the stream with the next batch.  training : the configuration as plain values.
    corpus_fingerprint : of the shards.  layout : processes, accumulation, precision, device; information alone.
    progress : plain values of the trainer.  window : tensors of the log window.
    """

    step: int
    stream: dict[str, Any]
    training: dict[str, Any]
    corpus_fingerprint: str
    layout: dict[str, Any]
    progress: dict[str, Any]
    window: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A checkpoint of a run in memory, on the CPU: the model in training mode's weights, tensors for `restore_optimizer`, state."""

    folder: Path
    model: TxFM
    optimizer: dict[str, Tensor]
    state: RunState


def checkpoint_name(step: int) -> str:
    """Name of the folder with the checkpoint of a step, in OUT/checkpoints."""
    return f"step-{step:08d}"


def save_run_state(out: Path, model: TxFM, optimizer: Mapping[str, Tensor], state: RunState) -> Path:
    """Write the checkpoint of a step and read it back; only then return its folder. One process calls it.

    A sound one of the same state that is there already is kept, a damaged or other one of that step is replaced.

    Raises
    ------
    ValueError
        If a weight or an optimizer tensor is not finite (the tensor is named), or the state is no plain JSON.
    OSError
        If the disk is full (bytes needed and free are named), cannot be written to, or gives back other bytes.
        After any error the older checkpoints are as they were and nothing new is there.
    """
    tensors = _tensors(model, optimizer, state.window)
    document = _document(state)
    folder = out / CHECKPOINTS / checkpoint_name(state.step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(folder.parent) as is_alone:
        if is_alone:
            _remove_leftovers(folder.parent)
        if folder.exists() and _holds(folder, document):
            return folder
        needed = sum(map(_bytes_of, (*tensors.values(), *model.state_dict().values()))) + _extra_bytes(model, document)
        check_room(folder.parent, needed)
        staging = _hidden(folder, "partial")
        try:
            with full_disk_is_named(folder.parent, needed):
                _stage(staging, model, tensors, document)
            _put_in_place(staging, folder, document)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def remove_old(out: Path, keep: int, *, step: int) -> list[Path]:
    """Remove the checkpoints that are older than the `keep` newest sound ones; return them. Damaged newer ones stay.

    All bytes of those that count are read. Without `keep` sound ones nothing is removed. Those of steps after `step`, the one
    just written, neither count nor go: a run that went back to an older checkpoint will come to them.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
    removed, sound = [], 0
    for folder in _newest_first(out):
        if folder.name > checkpoint_name(step):
            continue
        if sound >= keep:
            hidden = _hidden(folder, "removed")  # renamed first: a kill in the middle leaves no half one behind
            folder.rename(hidden)
            checkpoint.sync_folder(folder.parent)
            shutil.rmtree(hidden)
            removed.append(folder)
        elif _fault(folder) is None:
            sound += 1
    return removed


def remove_leftovers(out: Path) -> list[Path]:
    """Remove what killed saves left under hidden names, unless a living process is saving there; return what went.

    For the main process at the start of a run, before `find_resume`: what a kill caught between two renames is put back.
    """
    folder = out / CHECKPOINTS
    if not folder.is_dir():
        return _remove_unfinished_end(out)
    with only_writer(folder, waits=False) as is_alone:
        return _remove_leftovers(folder) + _remove_unfinished_end(out) if is_alone else []


def find_resume(out: Path, asked: str) -> Path | None:
    """Folder to go on from: with "auto" the newest sound one of the run in `out` (None if there is none), else `asked` itself.

    Damaged ones are passed over with a warning that names the file and what is wrong with it.

    Raises
    ------
    FileNotFoundError
        If the folder asked for is not there.
    ValueError
        If the folder asked for is not sound.
    """
    if asked != "auto":
        folder = Path(asked).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"resume: no folder at {asked}; give a folder in OUT/{CHECKPOINTS}, or auto")
        _open(folder)
        return folder
    for folder in _newest_first(out):
        fault = _fault(folder)
        if fault is None:
            return folder
        logger.warning("resume: passing over %s: %s", folder, fault)
    return None


def load_run_state(folder: Path) -> LoadedRun:
    """Open a checkpoint of a run, checking every file; tensors are in memory of their own, so that it may be removed.

    Raises
    ------
    ValueError
        Naming the file, what was expected, what was found and the remedy.
    """
    run = _open(folder)
    for parameter in run.model.parameters():
        parameter.data = parameter.data.clone()
    optimizer = {name: tensor.clone() for name, tensor in run.optimizer.items()}
    window = {name: tensor.clone() for name, tensor in run.state.window.items()}
    state = RunState(**{**vars(run.state), "window": window})
    return LoadedRun(folder=run.folder, model=run.model, optimizer=optimizer, state=state)


def check_same_run(saved: dict[str, Any], now: TrainConfig) -> None:
    """Check that a configuration goes on with the run that was saved.

    All that decides weights must be equal. Paths, intervals, threads, compilation and the split of a global batch may
    differ; another precision too, with a warning, since losses then differ by rounding.

    Raises
    ------
    ValueError
        Listing every setting that differs, with both values.
    """
    before, after = _flat(_without_secrets(saved)), _flat(_without_secrets(config_to_dict(now)))
    different = {
        key: (before.get(key, "absent"), after.get(key, "absent"))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "absent") != after.get(key, "absent")
    }
    decisive = {key: values for key, values in different.items() if key not in MAY_DIFFER}
    if decisive:
        listed = "; ".join(f"{key}: saved {old!r}, now {new!r}" for key, (old, new) in decisive.items())
        raise ValueError(
            f"the saved run is another one ({listed}); resume with the settings it was started with, or give another out"
        )
    if "loop.precision" in different:
        logger.warning("loop.precision: saved %r, now %r; losses go on within rounding", *different["loop.precision"])


def _tensors(model: TxFM, optimizer: Mapping[str, Tensor], window: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of optimizer.safetensors, after checking that what decides the run is finite."""
    try:
        check_optimizer_tensors(model, optimizer)
    except ValueError as error:
        raise ValueError(f"{OPTIMIZER}: {error}; no checkpoint was written") from error
    for name, tensor in (*model.state_dict().items(), *optimizer.items()):
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} has NaN or infinite values; no checkpoint was written, the last one is as it was. "
                f"Go on from it with a lower optim.lr, or with optim.clip_norm"
            )
    tensors = dict(optimizer) | {WINDOW + name: tensor for name, tensor in window.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _document(state: RunState) -> dict[str, Any]:
    """Content of resume.json without files and checksum, as it comes back from JSON."""
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "stream": state.stream,
        "training": _without_secrets(state.training),
        "corpus_fingerprint": state.corpus_fingerprint,
        "layout": state.layout,
        "progress": state.progress,
    }
    try:
        document = json.loads(json.dumps(document, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state of the run at step {state.step} is no plain JSON: {error}") from error
    unknown = {name: {"bytes": 0, "sha256": ""} for name in FILES}
    _check_fields(RESUME, document | {"files": unknown})
    return document


def _stage(staging: Path, model: TxFM, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """Write all files of a checkpoint into a hidden folder, resume.json last, each synced; `document` gets their checksums."""
    staging.mkdir()
    checkpoint.write_files(model, staging)
    checkpoint.write_tensors(tensors, staging / OPTIMIZER)
    checkpoint.sync_file(staging / OPTIMIZER)
    document["files"] = {
        name: {"bytes": (staging / name).stat().st_size, "sha256": checkpoint.sha256_of_file(staging / name)}
        for name in FILES
    }
    document["sha256"] = checkpoint.sha256_of_document(document)
    (staging / RESUME).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    checkpoint.sync_file(staging / RESUME)
    checkpoint.sync_folder(staging)


def _put_in_place(staging: Path, folder: Path, document: dict[str, Any]) -> None:
    """Rename a staged checkpoint and read it back; one that was there goes after that, and comes back if it fails."""
    before = _hidden(folder, "replaced") if folder.exists() else None
    if before is not None:
        folder.rename(before)
    try:
        staging.rename(folder)
        checkpoint.sync_folder(folder.parent)
        drop_cache([folder / name for name in (*FILES, RESUME)])
        try:
            found = _read_checked(folder)
        except ValueError as error:
            raise OSError(f"the disk does not give back what was written to it: {error}") from error
        if found != document:
            raise OSError(f"{folder / RESUME}: the disk gives back another document than was written to it")
    except BaseException:
        if folder.exists():
            folder.rename(staging)
        if before is not None:
            before.rename(folder)
        raise
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def _open(folder: Path) -> LoadedRun:
    """Check and open a checkpoint; tensors are mapped from its files."""
    document = _read_checked(folder)
    name = _NAME.fullmatch(folder.name)
    if name and int(name[1]) != document["step"]:
        raise ValueError(
            f"{folder / RESUME} holds step {document['step']}, the name of its folder says {int(name[1])}; rename it"
        )
    model = checkpoint.load_checkpoint(folder)
    tensors = checkpoint.read_tensors(folder / OPTIMIZER)
    window = {name.removeprefix(WINDOW): tensor for name, tensor in tensors.items() if name.startswith(WINDOW)}
    optimizer = {name: tensor for name, tensor in tensors.items() if not name.startswith(WINDOW)}
    try:
        check_optimizer_tensors(model, optimizer)
    except ValueError as error:
        raise ValueError(f"{folder / OPTIMIZER}: {error}; resume from another checkpoint") from error
    fields = {field: document[field] for field in _FIELDS if field != "files"}
    return LoadedRun(folder=folder, model=model, optimizer=optimizer, state=RunState(**fields, window=window))


def _read_checked(folder: Path) -> dict[str, Any]:
    """Content of resume.json, after checking it and the size and sha256 of every file it names."""
    if not (folder / RESUME).is_file():
        raise ValueError(
            f"{folder} is no checkpoint of a run: it has no {RESUME}; give a folder in OUT/{CHECKPOINTS}, or auto"
        )
    document = checkpoint.read_document(folder / RESUME, FORMAT, FORMAT_VERSION)
    _check_fields(folder / RESUME, document)
    for name in FILES:
        n_bytes, size = document["files"][name]["bytes"], file_size(folder / name)
        if size != n_bytes:
            raise ValueError(
                f"{folder / name} is {'missing' if size is None else f'damaged: {size} bytes'}, {RESUME} names "
                f"{n_bytes} bytes; resume from another checkpoint"
            )
    for name in FILES:
        expected, found = document["files"][name]["sha256"], checkpoint.sha256_of_file(folder / name)
        if found != expected:
            raise ValueError(
                f"{folder / name} is damaged: sha256 {found}, {RESUME} names {expected}; resume from another checkpoint"
            )
    return document


def _check_fields(where: object, document: dict[str, Any]) -> None:
    """Types of what a resume.json holds; its own checksum says that nothing was changed by accident, no more."""
    for field, kind in _FIELDS.items():
        if type(document.get(field)) is not kind:
            raise ValueError(f"{where}: {field} is {document.get(field)!r:.100}, expected {kind.__name__}")
    if document["step"] < 0:
        raise ValueError(f"{where}: step is {document['step']}, expected 0 or more")
    for field in ("epoch", "batch"):
        value = document["stream"].get(field)
        if type(value) is not int or value < 0:
            raise ValueError(f"{where}: stream.{field} is {value!r:.100}, expected a number, 0 or more")
    files = document["files"]
    if sorted(files) != sorted(FILES):
        raise ValueError(f"{where} names the files {sorted(files)!s:.200}, expected {sorted(FILES)}")
    for name, facts in files.items():
        if not isinstance(facts, dict) or type(facts.get("bytes")) is not int or type(facts.get("sha256")) is not str:
            raise ValueError(f"{where}: files.{name} is {facts!r:.100}, expected bytes and sha256")


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is sound."""
    try:
        _open(folder)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _holds(folder: Path, document: dict[str, Any]) -> bool:
    """Whether a folder is a sound checkpoint of the same run at the same place."""
    try:
        found = _open(folder).state
    except (ValueError, OSError) as error:
        logger.warning("replacing the checkpoint %s: %s", folder, error)
        return False
    same = ("step", "stream", "corpus_fingerprint")
    if all(getattr(found, field) == document[field] for field in same) and _decisive(found.training) == _decisive(
        document["training"]
    ):
        return True
    logger.warning("replacing the checkpoint %s: it is of another run", folder)
    return False


def _newest_first(out: Path) -> list[Path]:
    """Folders of `out` that are named as checkpoints, highest step first."""
    parent = out / CHECKPOINTS
    if not parent.is_dir():
        return []
    found = [
        (int(name[1]), path) for path in parent.iterdir() if (name := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _remove_leftovers(parent: Path) -> list[Path]:
    """Clear a folder of checkpoints that nobody else writes to of hidden folders."""
    removed = []
    for path in sorted(parent.iterdir()):
        name = _HIDDEN.fullmatch(path.name)
        if name is None:
            continue
        target = parent / f"step-{name[1]}"
        if name[2] == "replaced" and not target.exists():
            path.rename(target)
            logger.warning("%s was being replaced when its run was killed; it is back", target)
            continue
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    if removed:
        logger.info("removed %d unfinished checkpoint(s) that a killed run left in %s", len(removed), parent)
    return removed


def _remove_unfinished_end(out: Path) -> list[Path]:
    """Remove what was being written as the checkpoint of a run's end when it was killed."""
    left = sorted(out.glob(f".{checkpoint.FOLDER_IN_RUN}.*.partial"))
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def _hidden(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.{what}")


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _extra_bytes(model: TxFM, document: dict[str, Any]) -> int:
    """Room for what is no tensor: vocabulary, JSON, card, headers; rather too much."""
    return 256 * len(model.vocabulary) + 4 * len(json.dumps([document, model.provenance], default=str)) + 2**20


def _without_secrets(training: dict[str, Any]) -> dict[str, Any]:
    places = ("shards", "out", "init", "resume")
    return training | {key: without_secrets(training[key]) for key in places if isinstance(training.get(key), str)}


def _flat(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{where}{key}"
        leaves |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return leaves


def _decisive(training: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _flat(_without_secrets(training)).items() if key not in MAY_DIFFER}
