"""A checkpoint: a folder with config.json, model.safetensors, vocabulary.parquet and README.md. No pickles.

It is written under another name, synced and renamed, so that it is there whole or not at all. config.json is
written last and holds the sha256 of the other files and of itself.
"""

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from txfm_data.vocabulary import GeneStatistics, Vocabulary, read_vocabulary, write_vocabulary
from txfm_model.card import model_card
from txfm_model.config import ModelConfig, config_from_dict, config_to_dict
from txfm_model.disk import full_disk_is_named
from txfm_model.model import TxFM

FORMAT = "txfm-checkpoint"
FORMAT_VERSION = 1
CONFIG, WEIGHTS, VOCABULARY, CARD = "config.json", "model.safetensors", "vocabulary.parquet", "README.md"
FILES = (CONFIG, WEIGHTS, VOCABULARY, CARD)
_FIELDS: dict[str, type] = {
    "model": dict, "target_sum": float, "genes": int, "vocabulary_fingerprint": str, "provenance": dict, "files": dict,
}  # fmt: skip
MAX_DOCUMENT_BYTES = 16 * 2**20
"""Of config.json and resume.json; what is larger was not written by us."""
FOLDER_IN_RUN = "checkpoint"
"""Name of the checkpoint in the folder of a training run."""


def save_checkpoint(model: TxFM, folder: str | Path) -> Path:
    """Write a checkpoint into a folder that does not exist yet (an empty one is taken too).

    Raises
    ------
    FileExistsError
        If the folder holds something; nothing is written then.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; choose another or remove it")
    staging = _stage(model, folder)
    try:
        os.replace(staging, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def save_into(model: TxFM, folder: Path) -> None:
    """Write a checkpoint over one that may be there; until config.json is in place, the folder holds none."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = _stage(model, folder)
    try:
        (folder / CONFIG).unlink(missing_ok=True)
        for name in (WEIGHTS, VOCABULARY, CARD, CONFIG):
            os.replace(staging / name, folder / name)
        sync_folder(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def locate_checkpoint(
    path: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Find a checkpoint: its folder, the folder of its run, or the id of a model on the Hugging Face Hub.

    Raises
    ------
    FileNotFoundError
        If it is none of them.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        inside = folder / FOLDER_IN_RUN
        return inside if not (folder / CONFIG).exists() and inside.is_dir() else folder
    if folder.exists():
        raise ValueError(f"{path} is a file; a checkpoint is a folder with {', '.join(FILES)}")
    looks_like_id = path.count("/") == 1 and not path.startswith((".", "~", "/")) and not folder.parent.is_dir()
    if not looks_like_id:
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such folder")
    from huggingface_hub import snapshot_download

    downloaded = snapshot_download(
        path,
        revision=revision,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
        token=token,
        allow_patterns=list(FILES),
    )
    return Path(downloaded)


def load_checkpoint(folder: str | Path) -> TxFM:
    """Open a checkpoint folder on the CPU, checking checksums, vocabulary and shapes.

    Raises
    ------
    ValueError
        Naming the file and what is wrong with it.
    """
    folder = Path(folder)
    document = _read_config(folder)
    vocabulary, statistics = _read_checked_vocabulary(folder, document)
    for name in (WEIGHTS, VOCABULARY):
        _check_sha256(folder / name, document["files"][name])
    tensors = read_tensors(folder / WEIGHTS)
    config = _read_model_config(folder, document, sum(tensor.numel() for tensor in tensors.values()))
    with torch.device("meta"):
        model = TxFM(config, vocabulary)
    _check_shapes(folder / WEIGHTS, tensors, model)
    model.load_state_dict(tensors, assign=True)
    model.statistics = statistics
    model.provenance = document["provenance"]
    return model.eval()


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Check every file of a checkpoint as `from_pretrained` does, and that all weights are finite.

    Returns what `checkpoint_info` returns, with `model_card` ("as written", "edited" or "missing") beside it.

    Raises
    ------
    ValueError
        Naming the file and what is wrong with it.
    """
    folder = locate_checkpoint(str(folder))
    model = load_checkpoint(folder)
    broken = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise ValueError(f"{folder / WEIGHTS}: NaN or infinite weights in {', '.join(broken[:5])}")
    card = folder / CARD
    written = _read_config(folder)["files"][CARD]
    state = "missing" if not card.exists() else "as written" if sha256_of_file(card) == written else "edited"
    return {**checkpoint_info(folder), "model_card": state}


def checkpoint_info(folder: str | Path) -> dict[str, Any]:
    """Describe a checkpoint from config.json and the header of the weights; contents are not checked."""
    folder = locate_checkpoint(str(folder))
    document = _read_config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}; copy the checkpoint again") from error
    return {
        "path": str(folder),
        "format_version": document["format_version"],
        "parameters": sum(int(np.prod(shape)) for shape in shapes),
        "bytes": sum((folder / name).stat().st_size for name in FILES if (folder / name).exists()),
        "genes": document["genes"],
        "vocabulary_fingerprint": document["vocabulary_fingerprint"],
        "target_sum": document["target_sum"],
        "model": document["model"],
        **document["provenance"],
    }


def write_files(model: TxFM, folder: Path) -> None:
    """Write the files of a checkpoint into a folder, synced to disk, config.json last; names there are overwritten."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_vocabulary(folder / VOCABULARY, model.vocabulary, model.statistics or _no_statistics(model.vocabulary))
    (folder / CARD).write_text(model_card(model.config, model.vocabulary, model.n_parameters, model.provenance))
    write_tensors(tensors, folder / WEIGHTS)
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": config_to_dict(model.config),
        "target_sum": model.config.target_sum,
        "genes": len(model.vocabulary),
        "vocabulary_fingerprint": model.vocabulary.fingerprint,
        "provenance": model.provenance,
        "files": {name: sha256_of_file(folder / name) for name in (WEIGHTS, VOCABULARY, CARD)},
    }
    document["sha256"] = sha256_of_document(document)
    (folder / CONFIG).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    for name in FILES:
        sync_file(folder / name)
    sync_folder(folder)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write contiguous CPU tensors as safetensors, readable by whom the umask lets."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(stat.S_IMODE(mode))  # safetensors lets only the owner read it


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Open a safetensors file as tensors on the CPU that are mapped from it, not copied.

    Raises
    ------
    ValueError
        If the file is none, or cut short.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; copy the checkpoint again") from error


def read_document(path: Path, format_name: str, version: int) -> dict[str, Any]:
    """Read a JSON file of a checkpoint, checking its size, format, version and own sha256 before anything in it.

    Raises
    ------
    ValueError
        Naming the file and what is wrong with it.
    """
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes, expected at most {MAX_DOCUMENT_BYTES}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        sha256 = sha256_of_document(document) if isinstance(document, dict) else ""
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{path} is damaged: {error}; copy the checkpoint again") from error
    if not isinstance(document, dict) or document.get("format") != format_name:
        raise ValueError(f'{path} is not what its name says: it has no "format": "{format_name}"')
    if document.get("format_version") != version:
        raise ValueError(
            f"{path}: format version {document.get('format_version')!r}, this program reads "
            f"{version}; install the version of txfm that wrote it"
        )
    if document.get("sha256") != sha256:
        raise ValueError(f"{path} was changed after it was written (its sha256 differs); copy the checkpoint again")
    return document


def _stage(model: TxFM, folder: Path) -> Path:
    """Write the files of a checkpoint into a new folder beside `folder`, synced to disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{uuid4().hex[:8]}.partial"
    staging.mkdir()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        with full_disk_is_named(folder.parent, needed):
            write_files(model, staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return staging


def _no_statistics(vocabulary: Vocabulary) -> GeneStatistics:
    n = len(vocabulary)
    return GeneStatistics(np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.float64))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {CONFIG}, as after an unfinished copy or training run")
    document = read_document(path, FORMAT, FORMAT_VERSION)
    for key, kind in _FIELDS.items():
        if not isinstance(document.get(key), kind):
            raise ValueError(
                f"{path}: {key} is {document.get(key)!r:.100}, expected {kind.__name__}; copy the checkpoint again"
            )
    if not all(isinstance(document["files"].get(name), str) for name in (WEIGHTS, VOCABULARY)):
        raise ValueError(f"{path}: files lacks the sha256 of {WEIGHTS} or {VOCABULARY}; copy the checkpoint again")
    missing = [name for name in (WEIGHTS, VOCABULARY) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: the checkpoint lacks {', '.join(missing)}; copy it again")
    return document


def _read_model_config(folder: Path, document: dict[str, Any], n_values: int) -> ModelConfig:
    """The configuration of the model, refused before a network is built of a size that the weights cannot have."""
    try:
        config = config_from_dict(ModelConfig, document["model"], "model")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}; copy the checkpoint again") from error
    least = 2 * config.width**2 * (config.blocks * config.mlp_ratio + config.decoder_blocks)
    if least > n_values:
        raise ValueError(
            f"{folder / WEIGHTS} holds {n_values} values, the configuration asks for more than {least}; "
            f"weights and configuration are of different models"
        )
    return config


def _read_checked_vocabulary(folder: Path, document: dict[str, Any]) -> tuple[Vocabulary, GeneStatistics]:
    path = folder / VOCABULARY
    try:
        vocabulary, statistics = read_vocabulary(path)
    except (OSError, TypeError, pa.ArrowException) as error:  # what pyarrow makes of a damaged file
        raise ValueError(f"{path} is damaged: {error}; copy the checkpoint again") from error
    if vocabulary.fingerprint != document["vocabulary_fingerprint"]:
        raise ValueError(
            f"{path} is not the vocabulary that the model was trained on: its fingerprint is "
            f"{vocabulary.fingerprint}, {CONFIG} names {document['vocabulary_fingerprint']}; "
            f"restore the file that came with the checkpoint"
        )
    return vocabulary, statistics


def _check_shapes(path: Path, tensors: dict[str, Tensor], model: TxFM) -> None:
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{path}: {name} is {found.get(name, 'missing')}, the configuration asks for "
                f"{expected.get(name, 'no such tensor')}; weights and configuration are of different models"
            )


def _check_sha256(path: Path, expected: str) -> None:
    found = sha256_of_file(path)
    if found != expected:
        raise ValueError(f"{path} is damaged: sha256 {found}, {CONFIG} names {expected}; copy the checkpoint again")


def sha256_of_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_document(document: dict[str, Any]) -> str:
    """sha256 of config.json's content without its own field "sha256", whatever the layout of the text."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
