"""A checkpoint: a folder with config.json, model.safetensors, vocabulary.parquet and README.md. No pickles.

It is written under another name, synced and renamed, so that it is there whole or not at all. config.json is
written last and holds the sha256 of the other files and of itself.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from txfm_data.vocabulary import GeneStatistics, Vocabulary, read_vocabulary, write_vocabulary
from txfm_model.card import model_card
from txfm_model.config import ModelConfig, config_from_dict, config_to_dict
from txfm_model.model import TxFM

FORMAT = "txfm-checkpoint"
FORMAT_VERSION = 1
CONFIG, WEIGHTS, VOCABULARY, CARD = "config.json", "model.safetensors", "vocabulary.parquet", "README.md"
FILES = (CONFIG, WEIGHTS, VOCABULARY, CARD)
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
        _sync_folder(folder.parent)
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
        _sync_folder(folder)
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
    with torch.device("meta"):
        model = TxFM(config_from_dict(ModelConfig, document["model"], "model"), vocabulary)
    tensors = _read_weights(folder / WEIGHTS)
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
    state = "missing" if not card.exists() else "as written" if _sha256(card) == written else "edited"
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


def _stage(model: TxFM, folder: Path) -> Path:
    """Write the files of a checkpoint into a new folder beside `folder`, synced to disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{uuid4().hex[:8]}.partial"
    staging.mkdir()
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        write_vocabulary(staging / VOCABULARY, model.vocabulary, model.statistics or _no_statistics(model.vocabulary))
        (staging / CARD).write_text(model_card(model.config, model.vocabulary, model.n_parameters, model.provenance))
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(staging / CARD, staging / WEIGHTS)  # safetensors lets only the owner read it
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": config_to_dict(model.config),
            "target_sum": model.config.target_sum,
            "genes": len(model.vocabulary),
            "vocabulary_fingerprint": model.vocabulary.fingerprint,
            "provenance": model.provenance,
            "files": {name: _sha256(staging / name) for name in (WEIGHTS, VOCABULARY, CARD)},
        }
        document["sha256"] = _sha256_of_document(document)
        (staging / CONFIG).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
        for name in FILES:
            with (staging / name).open("rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(staging)
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
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{path} is damaged: {error}; copy the checkpoint again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'{path} is not the configuration of a TxFM checkpoint: it has no "format": "{FORMAT}"')
    if document.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {document.get('format_version')!r}, this program reads "
            f"{FORMAT_VERSION}; install the version of txfm that wrote it"
        )
    if document.get("sha256") != _sha256_of_document(document):
        raise ValueError(f"{path} was changed after it was written (its sha256 differs); copy the checkpoint again")
    missing = [name for name in (WEIGHTS, VOCABULARY) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: the checkpoint lacks {', '.join(missing)}; copy it again")
    return document


def _read_checked_vocabulary(folder: Path, document: dict[str, Any]) -> tuple[Vocabulary, GeneStatistics]:
    path = folder / VOCABULARY
    vocabulary, statistics = read_vocabulary(path)
    if vocabulary.fingerprint != document["vocabulary_fingerprint"]:
        raise ValueError(
            f"{path} is not the vocabulary that the model was trained on: its fingerprint is "
            f"{vocabulary.fingerprint}, {CONFIG} names {document['vocabulary_fingerprint']}; "
            f"restore the file that came with the checkpoint"
        )
    return vocabulary, statistics


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; copy the checkpoint again") from error


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
    found = _sha256(path)
    if found != expected:
        raise ValueError(f"{path} is damaged: sha256 {found}, {CONFIG} names {expected}; copy the checkpoint again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_document(document: dict[str, Any]) -> str:
    """sha256 of config.json's content without its own field "sha256", whatever the layout of the text."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
