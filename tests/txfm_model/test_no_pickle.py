"""No checkpoint is ever unpickled: a pickle under the name of any of our files is refused and does not run."""

import ast
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from tests.test_house import NAMES, SOURCES, dotted
from txfm_model import checkpoint, run_state
from txfm_model.checkpoint import checkpoint_info, load_checkpoint, save_checkpoint, verify_checkpoint
from txfm_model.config import ModelConfig, TrainConfig, config_from_dict, config_to_dict
from txfm_model.model import TxFM
from txfm_model.run_state import RunState, find_resume, load_run_state, save_run_state

# What writes or reads pickles besides the modules and calls that tests/test_house.py forbids: Accelerate's own states,
# torch.save and TorchScript, pandas, and torch.distributed's collectives of objects.
PICKLING_CALLS = {"torch.save", "torch.jit.load", "torch.jit.save", "torch.hub.load", "torch.package.PackageImporter"}
PICKLING_NAMES = {
    "load_state", "save_state", "register_for_checkpointing", "to_pickle", "read_pickle", "save_model", "load_model",
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def as_pickle(payload: Payload) -> bytes:
    return pickle.dumps({"head.bias": payload})


def as_torch_archive(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"head.bias": torch.ones(3), "payload": payload}, buffer)
    return buffer.getvalue()


def as_old_torch_file(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"payload": payload}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


FORMS = [as_pickle, as_torch_archive, as_old_torch_file]


@pytest.fixture(scope="module")
def run(tmp_path_factory, vocabulary) -> Path:
    """The folder of a run with a checkpoint to resume from, and a checkpoint at its end."""
    out = tmp_path_factory.mktemp("run")
    model = TxFM(ModelConfig(width=16, blocks=2, heads=2), vocabulary)
    training = config_to_dict(config_from_dict(TrainConfig, {"shards": "s", "out": "o", "loop": {"steps": 1}}))
    state = RunState(
        step=1, stream={"epoch": 0, "batch": 1}, training=training, corpus_fingerprint="c", layout={}, progress={},
        window={"losses": torch.ones(2)},
    )  # fmt: skip
    save_run_state(out, model, {}, state)
    save_checkpoint(model, out / "checkpoint")
    return out


def make_checksums_fit(folder: Path) -> None:
    """Name the bytes that are there, in the documents that are not themselves replaced."""
    for document_name in ("config.json", "resume.json"):
        try:
            document = json.loads((folder / document_name).read_text())
        except (ValueError, OSError):
            continue
        for name in document["files"]:
            path = folder / name
            sha256 = checkpoint.sha256_of_file(path)
            facts = {"bytes": path.stat().st_size, "sha256": sha256}
            document["files"][name] = facts if document_name == "resume.json" else sha256
        document["sha256"] = checkpoint.sha256_of_document(document)
        (folder / document_name).write_text(json.dumps(document))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in (*run_state.FILES, "resume.json") if name != "README.md"])
def test_a_pickle_under_the_name_of_a_file_is_refused_and_does_not_run(run, tmp_path, name, form):
    marker = tmp_path / "the payload ran"
    shutil.copytree(run, tmp_path / "run")
    folders = [tmp_path / "run" / run_state.CHECKPOINTS / "step-00000001"]
    if (run / "checkpoint" / name).exists():
        folders.append(tmp_path / "run" / "checkpoint")
    for folder in folders:
        (folder / name).write_bytes(form(Payload(marker)))
        make_checksums_fit(folder)
    with pytest.raises(ValueError, match=name):
        load_run_state(folders[0])
    assert find_resume(tmp_path / "run", "auto") is None
    for folder in folders[1:]:
        for opener in (load_checkpoint, verify_checkpoint, TxFM.from_pretrained):
            with pytest.raises(ValueError, match=name):
                opener(folder)
        if name in ("config.json", "model.safetensors"):
            with pytest.raises(ValueError, match=name):
                checkpoint_info(folder)
    assert not marker.exists()


@pytest.mark.parametrize("form", FORMS)
def test_the_payload_would_run_if_it_were_unpickled(tmp_path, form):
    marker = tmp_path / "the payload ran"
    data = form(Payload(marker))
    if form is as_pickle:
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert marker.exists()


def test_files_that_we_write_are_no_pickles(run):
    folders = [run / "checkpoint", run / run_state.CHECKPOINTS / "step-00000001"]
    paths = [path for folder in folders for path in folder.iterdir()]
    assert {path.name for path in paths} == {*run_state.FILES, "resume.json"}
    for path in paths:
        assert not zipfile.is_zipfile(path), path
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, IndexError, EOFError)):
            pickle.loads(path.read_bytes())


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_nothing_pickles_for_others_to_unpickle(path: Path) -> None:
    calls = [dotted(n.func) for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert [name for name in calls if name in PICKLING_CALLS or name.rpartition(".")[2] in PICKLING_NAMES] == []


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_arrays_are_written_and_read_without_pickles(path: Path) -> None:
    """np.save pickles arrays of objects unless it is told not to; np.load does not by default, but is told too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and dotted(node.func) in ("np.save", "np.load", "numpy.save", "numpy.load"):
            told = [k for k in node.keywords if k.arg == "allow_pickle"]
            assert told and isinstance(told[0].value, ast.Constant) and told[0].value.value is False, node.lineno
