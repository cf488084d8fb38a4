"""Checkpoints of a run: whole or not there, found again after any kill, refused when anything is not as it was written."""

import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from txfm_data.config_tree import to_tree
from txfm_data.vocabulary import Vocabulary, write_vocabulary
from txfm_model import checkpoint, disk, run_state
from txfm_model.config import ModelConfig, TrainConfig, config_from_dict, config_to_dict
from txfm_model.model import TxFM
from txfm_model.optimizer_state import optimizer_tensors, restore_optimizer
from txfm_model.run_state import (
    CHECKPOINTS,
    MAY_DIFFER,
    RunState,
    check_same_run,
    checkpoint_name,
    find_resume,
    load_run_state,
    remove_leftovers,
    remove_old,
    save_run_state,
)  # fmt: skip

ROOT = Path(__file__).parents[2]
ALL_FILES = (*run_state.FILES, "resume.json")

LAST = 10**6  # a step after all of these


def train_config(**changes) -> TrainConfig:
    tree = {"shards": "s", "out": "o", "loop": {"steps": 100}, "model": {"width": 16, "blocks": 3}}
    return config_from_dict(TrainConfig, tree | changes)


def state_at(step: int, **changes) -> RunState:
    fields = {
        "step": step,
        "stream": {
            "version": 1,
            "epoch": step // 4,
            "batch": step % 4,
            "seed": 0,
            "global_batch": 64,
            "corpus": "c0ffee",
        },
        "training": config_to_dict(train_config()),
        "corpus_fingerprint": "c0ffee",
        "layout": {"processes": 2, "accumulation": 1, "precision": "no", "device": "cpu"},
        "progress": {"seconds": 1.25, "train_line": {"loss": 0.1, "none": None}},
        "window": {"losses": torch.arange(8.0).reshape(2, 4), "measured_G": torch.arange(40) % 2 == 0},
    }
    return RunState(**(fields | changes))


class Trained:
    """A tiny model with an optimizer that has seen gradients."""

    def __init__(self, model: TxFM, seed: int = 0) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.rng = np.random.default_rng(seed)
        self.step()

    def step(self) -> float:
        """A step on gradients that depend on the weights and on what the generator gives."""
        for parameter in self.model.parameters():
            parameter.grad = torch.sin(parameter.detach()) + float(self.rng.normal())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(parameter.detach().double().square().sum().item() for parameter in self.model.parameters())

    def save(self, out: Path, step: int, **changes) -> Path:
        return save_run_state(out, self.model, self.tensors, state_at(step, **changes))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return optimizer_tensors(self.model, self.optimizer)


@pytest.fixture
def trained(tiny_model, statistics) -> Trained:
    tiny_model.statistics = statistics
    tiny_model.provenance = {"corpus_fingerprint": "c0ffee"}
    return Trained(tiny_model)


@pytest.fixture(autouse=True)
def synced(monkeypatch) -> list[str]:
    """Paths that would have been synced, in order; the disk is not waited for."""
    paths: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: paths.append(os.path.realpath(f"/proc/self/fd/{handle}")))
    return paths


@pytest.fixture(scope="module")
def saved_two(tmp_path_factory, vocabulary, statistics) -> Path:
    """A run's folder with checkpoints of step 10 and 20."""
    model = TxFM(ModelConfig(width=16, blocks=3, heads=2, layerscale_init=0.5), vocabulary).eval()
    model.statistics = statistics
    trained, out = Trained(model), tmp_path_factory.mktemp("run")
    trained.save(out, 10)
    trained.step()
    trained.save(out, 20)
    return out


@pytest.fixture
def two(saved_two, tmp_path) -> tuple[Path, Path]:
    """Checkpoints of step 10 and 20 in tmp_path."""
    shutil.copytree(saved_two / CHECKPOINTS, tmp_path / CHECKPOINTS)
    return tmp_path / CHECKPOINTS / "step-00000010", tmp_path / CHECKPOINTS / "step-00000020"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / CHECKPOINTS).iterdir() if path.name != ".lock")


def rewrite(folder: Path, **changes) -> None:
    """Change resume.json as a careful forger would: all checksums made to fit."""
    path = folder / "resume.json"
    document = json.loads(path.read_text())
    for name, facts in document["files"].items():
        if (folder / name).is_file():
            facts |= {"bytes": (folder / name).stat().st_size, "sha256": checkpoint.sha256_of_file(folder / name)}
    document |= changes
    document["sha256"] = checkpoint.sha256_of_document(document)
    path.write_text(json.dumps(document))


def rewrite_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text()) | changes
    document["files"] = {
        name: checkpoint.sha256_of_file(folder / name)
        for name in ("model.safetensors", "vocabulary.parquet", "README.md")
    } | changes.get("files", {})
    document["sha256"] = checkpoint.sha256_of_document(document)
    path.write_text(json.dumps(document))
    rewrite(folder)


def assert_passed_over(out: Path, damaged: Path, other: Path | None, words: str, caplog) -> None:
    """`auto` takes the other one and says why; asked for by name it is refused, by both functions."""
    caplog.clear()
    assert find_resume(out, "auto") == other
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(damaged) in warning.getMessage()
    assert words in warning.getMessage()
    for opener in (load_run_state, lambda folder: find_resume(out, str(folder))):
        with pytest.raises(ValueError, match="(?s).") as error:
            opener(damaged)
        assert words in str(error.value)


def test_a_run_comes_back_as_it_was(trained, tmp_path):
    folder = trained.save(tmp_path, 1234)
    assert folder == tmp_path / "checkpoints" / "step-00001234"
    assert sorted(contents(folder)) == sorted(ALL_FILES)
    run = load_run_state(folder)
    assert run.folder == folder
    state, expected = run.state, state_at(1234)
    for field in dataclasses.fields(RunState):
        if field.name != "window":
            assert getattr(state, field.name) == getattr(expected, field.name), field.name
    assert state.window.keys() == expected.window.keys()
    for name, tensor in expected.window.items():
        assert torch.equal(state.window[name], tensor) and state.window[name].dtype == tensor.dtype
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), trained.model.parameters(), strict=True))
    assert run.model.vocabulary == trained.model.vocabulary
    assert run.model.provenance == trained.model.provenance
    assert run.optimizer.keys() == trained.tensors.keys()
    assert all(torch.equal(run.optimizer[name], tensor) for name, tensor in trained.tensors.items())
    assert TxFM.from_pretrained(folder).config == trained.model.config  # it is a checkpoint of the model too


def test_it_goes_on_bit_for_bit_even_if_the_checkpoint_is_removed_meanwhile(trained, tmp_path):
    folder = trained.save(tmp_path, 1)
    run = load_run_state(folder)
    shutil.rmtree(folder)
    again = Trained(run.model)
    run.model.load_state_dict(trained.model.state_dict())
    restore_optimizer(run.model, again.optimizer, run.optimizer)
    assert [trained.step() for _ in range(5)] == [again.step() for _ in range(5)]


def test_all_files_may_be_read_by_whom_the_umask_lets(two):
    assert len({path.stat().st_mode for path in two[0].iterdir()}) == 1


@pytest.mark.parametrize("count_head", ["nb", "zinb"])
def test_models_with_count_heads(count_head, tiny_config, vocabulary, tmp_path):
    trained = Trained(TxFM(dataclasses.replace(tiny_config, count_head=count_head), vocabulary).eval())
    run = load_run_state(trained.save(tmp_path, 1))
    assert run.model.state_dict().keys() == trained.model.state_dict().keys()
    assert "head.log_dispersion" in run.model.state_dict()


def test_find_resume(two, tmp_path, caplog):
    first, second = two
    assert find_resume(tmp_path, "auto") == second
    assert find_resume(tmp_path, str(first)) == first
    assert find_resume(tmp_path / "nowhere", "auto") is None
    shutil.move(first, tmp_path / "moved")
    assert find_resume(tmp_path / "nowhere", str(tmp_path / "moved")) == tmp_path / "moved"
    with pytest.raises(FileNotFoundError, match="no folder at"):
        find_resume(tmp_path, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="no checkpoint of a run: it has no resume.json"):
        find_resume(tmp_path, str(tmp_path))
    (tmp_path / CHECKPOINTS / "step-00000099").write_text("a file")
    (tmp_path / CHECKPOINTS / "step-9").mkdir()
    assert find_resume(tmp_path, "auto") == second
    assert caplog.messages == []


def test_steps_are_ordered_as_numbers(trained, tmp_path):
    for step in (99_999_999, 100_000_000):
        trained.save(tmp_path, step)
    assert find_resume(tmp_path, "auto").name == checkpoint_name(100_000_000) == "step-100000000"


def damage_flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(int(share * len(data)), len(data) - 2)] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "first_byte": lambda path: damage_flip(path, 0),
    "middle": lambda path: damage_flip(path, 0.5),
    "last_byte": lambda path: damage_flip(path, 1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "emptied": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "dangling": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ALL_FILES)
def test_every_damage_to_every_file_is_found_and_the_one_before_is_taken(two, tmp_path, caplog, name, damage):
    DAMAGES[damage](two[1] / name)
    assert_passed_over(tmp_path, two[1], two[0], name, caplog)


def test_with_nothing_sound_there_is_nothing_to_go_on_from(two, tmp_path, caplog):
    for folder in two:
        (folder / "optimizer.safetensors").unlink()
    assert find_resume(tmp_path, "auto") is None
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("name", run_state.FILES)
def test_files_swapped_between_checkpoints_are_found(two, tmp_path, caplog, name):
    shutil.copy(two[0] / name, two[1] / name)
    if (two[0] / name).read_bytes() == (two[1] / name).read_bytes() and name in ("vocabulary.parquet", "README.md"):
        (two[1] / name).write_bytes(b"x" * (two[1] / name).stat().st_size)
    assert_passed_over(tmp_path, two[1], two[0], name, caplog)


def test_a_renamed_checkpoint_is_found(two, tmp_path, caplog):
    renamed = two[0].with_name("step-00000030")
    two[0].rename(renamed)
    assert_passed_over(tmp_path, renamed, two[1], "holds step 10, the name of its folder says 30", caplog)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "pickle"}, "not what its name says"),
        ({"format_version": 2}, "format version 2, this program reads 1"),
        ({"step": "10"}, "step is '10', expected int"),
        ({"step": True}, "step is True, expected int"),
        ({"step": -1}, "step is -1, expected 0 or more"),
        ({"step": 19}, "holds step 19"),
        ({"stream": None}, "stream is None, expected dict"),
        ({"stream": {"epoch": 0}}, "stream.batch is None"),
        ({"stream": {"epoch": -1, "batch": 0}}, "stream.epoch is -1"),
        ({"stream": {"epoch": 0, "batch": 1.5}}, "stream.batch is 1.5"),
        ({"training": []}, "training is [], expected dict"),
        ({"corpus_fingerprint": 7}, "corpus_fingerprint is 7"),
        ({"progress": "x" * 9999}, "expected dict"),
        ({"layout": None}, "layout is None"),
        ({"files": {}}, "names the files []"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "names the files ['../../etc/passwd']"),
        ({"files": dict.fromkeys(run_state.FILES, "x")}, "expected bytes and sha256"),
        ({"files": {name: {"bytes": True, "sha256": "x"} for name in run_state.FILES}}, "expected bytes and sha256"),
        ({"files": {name: {"bytes": 10**30, "sha256": "x"} for name in run_state.FILES}}, "names 1000000000000000000"),
    ],
)
def test_a_forged_document_is_refused(two, tmp_path, caplog, changes, words):
    rewrite(two[1], **changes)
    assert_passed_over(tmp_path, two[1], two[0], words, caplog)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "resume.json is damaged"),
        ('{"a":' * 100_000, "resume.json is damaged"),
        ('{"a":' * 970 + "1" + "}" * 970, "resume.json"),
        ("[]", "not what its name says"),
        ("null", "not what its name says"),
        ('{"step": ' + "9" * 10_000 + "}", "resume.json is damaged"),
        ("\ud800".encode("utf-16", "surrogatepass").decode("latin1"), "resume.json is damaged"),
        (" " * (17 * 2**20), "expected at most"),
    ],
    ids=["deep_list", "deep_dict", "near_the_limit", "list", "null", "long_number", "no_text", "huge"],
)
def test_text_that_is_no_document_is_refused(two, tmp_path, caplog, text, words):
    (two[1] / "resume.json").write_text(text)
    assert_passed_over(tmp_path, two[1], two[0], words, caplog)


def forge_vocabulary(folder: Path, statistics) -> None:
    vocabulary = TxFM.from_pretrained(folder).vocabulary
    ids = vocabulary.gene_ids
    write_vocabulary(
        folder / "vocabulary.parquet", Vocabulary((ids[1], ids[0], *ids[2:]), vocabulary.symbols), statistics
    )
    rewrite_config(folder)


def forge_tensors(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    (folder / name).unlink()
    save_file(tensors, folder / name)
    rewrite_config(folder)


def shorter_bias(tensors):
    tensors["head.bias"] = tensors["head.bias"][:-1].clone()


FORGERIES = {
    "not the vocabulary": forge_vocabulary,
    "head.bias is ((39,)": lambda folder, _: forge_tensors(folder, "model.safetensors", shorter_bias),
    "head.bias2": lambda folder, _: forge_tensors(
        folder, "model.safetensors", lambda t: t.update({"head.bias2": torch.ones(1)})
    ),
    "exp_avg/head.bias is missing": lambda folder, _: forge_tensors(
        folder, "optimizer.safetensors", lambda t: t.pop("exp_avg/head.bias")
    ),
    "exp_avg/head.bias is ((3,)": lambda folder, _: forge_tensors(
        folder, "optimizer.safetensors", lambda t: t.update({"exp_avg/head.bias": torch.ones(3)})
    ),
    "of no parameter": lambda folder, _: forge_tensors(
        folder, "optimizer.safetensors", lambda t: t.update({"stray": torch.ones(3)})
    ),
    "more than 614400002048": lambda folder, _: rewrite_config(
        folder, model=json.loads((folder / "config.json").read_text())["model"] | {"blocks": 300_000_000}
    ),
    "model.width": lambda folder, _: rewrite_config(folder, model={"width": "wide"}),
    "model is None": lambda folder, _: rewrite_config(folder, model=None),
    "genes is 'x'": lambda folder, _: rewrite_config(folder, genes="x"),
    "files lacks the sha256": lambda folder, _: rewrite_config(folder, files={"model.safetensors": None}),
}


@pytest.mark.parametrize("words", FORGERIES)
def test_a_forged_file_is_refused_though_all_checksums_fit(two, tmp_path, caplog, statistics, words):
    FORGERIES[words](two[1], statistics)
    assert_passed_over(tmp_path, two[1], two[0], words, caplog)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "vocabulary.parquet"])
def test_random_bytes_whose_checksums_fit_are_read_or_refused(two, name):
    """What reaches the parsers of safetensors and parquet gives a ValueError, or tensors of the right shape; never more."""
    path = two[1] / name
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        at = rng.integers(0, len(data) if name == "vocabulary.parquet" else 4000)
        for _ in range(rng.integers(1, 4)):
            data[(at + rng.integers(0, 30)) % len(data)] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)
        rewrite_config(two[1])
        try:
            load_run_state(two[1])
        except ValueError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["weight", "exp_avg"])
def test_what_is_not_finite_is_not_saved(two, trained, tmp_path, where, bad):
    before = [contents(folder) for folder in two]
    with torch.no_grad():
        if where == "weight":
            trained.model.head.bias[3] = bad
        else:
            trained.optimizer.state[trained.model.head.bias]["exp_avg"][3] = bad
    with pytest.raises(ValueError, match="head.bias has NaN or infinite values; no checkpoint was written"):
        trained.save(tmp_path, 30)
    with pytest.raises(ValueError, match="head.bias"):
        trained.save(tmp_path / "fresh", 30)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert [contents(folder) for folder in two] == before
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize(
    "changes", [{"progress": {"loss": float("nan")}}, {"progress": {"x": object()}}, {"step": -1}, {"stream": {}}]
)
def test_a_state_that_is_no_plain_value_is_not_saved(trained, tmp_path, changes):
    with pytest.raises(ValueError, match=r"plain JSON|resume.json"):
        save_run_state(tmp_path, trained.model, trained.tensors, dataclasses.replace(state_at(1), **changes))
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_of_another_model_is_not_saved(trained, tmp_path):
    with pytest.raises(ValueError, match="of no parameter of the model"):
        save_run_state(tmp_path, trained.model, {"exp_avg/x": torch.ones(1)}, state_at(1))
    assert list(tmp_path.iterdir()) == []


def test_secrets_of_addresses_are_not_written(trained, tmp_path):
    training = config_to_dict(train_config(shards="s3://user:hunter2@bucket/corpus?token=hunter2"))
    folder = trained.save(tmp_path, 1, training=training)
    assert "hunter2" not in (folder / "resume.json").read_text()
    check_same_run(load_run_state(folder).state.training, train_config(shards="s3://user:hunter2@bucket/corpus"))


# ---- writing


def test_all_is_on_the_disk_before_it_gets_its_name_and_the_name_before_it_is_read_back(
    trained, tmp_path, monkeypatch, synced
):
    events: list[tuple[str, list[str]]] = []
    rename, drop = Path.rename, run_state.drop_cache

    def note(event):
        events.append((event, [Path(path).name for path in synced]))
        synced.clear()

    monkeypatch.setattr(Path, "rename", lambda self, to: (note("rename"), rename(self, to))[1])
    monkeypatch.setattr(run_state, "drop_cache", lambda paths: (note("read back"), drop(paths)))
    trained.save(tmp_path, 7)
    assert [event for event, _ in events] == ["rename", "read back"]
    assert {name for name in events[0][1] if not name.startswith(".step")} == set(ALL_FILES)
    assert events[0][1][-1].startswith(".step")  # the staging folder itself, last
    assert events[0][1].index("resume.json") > events[0][1].index("optimizer.safetensors")
    assert events[1][1] == [CHECKPOINTS]


def test_a_sound_checkpoint_of_the_same_state_is_kept(two, trained, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in two[1].iterdir()}
    trained.step()
    assert trained.save(tmp_path, 20, layout={"processes": 8}) == two[1]
    assert {path: path.stat().st_mtime_ns for path in two[1].iterdir()} == before


@pytest.mark.parametrize("why", ["damaged", "other_run"])
def test_another_checkpoint_of_the_same_step_is_replaced(two, trained, tmp_path, caplog, why):
    training = config_to_dict(train_config(loop={"steps": 100, "seed": 1}) if why == "other_run" else train_config())
    if why == "damaged":
        (two[1] / "model.safetensors").unlink()
    trained.step()
    assert trained.save(tmp_path, 20, training=training) == two[1]
    assert "replacing the checkpoint" in caplog.text
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    run = load_run_state(two[1])
    assert run.state.training == training
    assert torch.equal(run.model.head.bias, trained.model.head.bias)


INTERRUPTED = [
    (checkpoint, "save_file", 1), (checkpoint, "save_file", 2), (checkpoint, "write_vocabulary", 1),
    (checkpoint, "model_card", 1), (checkpoint, "sync_file", 1), (checkpoint, "sync_file", 5), (checkpoint, "sync_file", 6),
    (checkpoint, "sync_folder", 1), (checkpoint, "sync_folder", 2), (checkpoint, "sync_folder", 3),
    (run_state, "drop_cache", 1), (run_state, "_read_checked", 1), (run_state, "check_room", 1),
]  # fmt: skip
"""Functions of a save and the number of the call that is interrupted."""


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize(("module", "function", "call"), INTERRUPTED)
def test_an_interruption_at_any_call_leaves_what_was_there(
    two, trained, tmp_path, monkeypatch, module, function, call, replaces
):
    before = [contents(folder) for folder in two]
    training = config_to_dict(train_config(loop={"steps": 100, "seed": 1}))
    original, calls = getattr(module, function), []

    def interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + (function == "_read_checked" and replaces):  # the first looks at what is to be replaced
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained.save(tmp_path, 20 if replaces else 30, training=training)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert [contents(folder) for folder in two] == before


@pytest.mark.parametrize("replaces", [False, True])
def test_a_disk_that_gives_back_other_bytes_is_found(two, trained, tmp_path, monkeypatch, replaces):
    before = [contents(folder) for folder in two]
    monkeypatch.setattr(run_state, "drop_cache", lambda paths: damage_flip(paths[1], 0.5))
    training = config_to_dict(train_config(loop={"steps": 100, "seed": 1}))
    with pytest.raises(OSError, match="does not give back what was written.*sha256"):
        trained.save(tmp_path, 20 if replaces else 30, training=training)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert [contents(folder) for folder in two] == before


def test_room_is_looked_for_before_anything_is_written(two, trained, tmp_path, monkeypatch):
    size = sum(path.stat().st_size for path in two[0].iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    monkeypatch.setattr(run_state, "_stage", lambda *_: pytest.fail("it was written to"))
    with pytest.raises(OSError, match=f"a checkpoint needs [0-9,]+ bytes, {size - 1:,} are free") as error:
        trained.save(tmp_path, 30)
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_while_writing(two, trained, tmp_path, monkeypatch, raised):
    def fail(tensors, path, **_):
        path.write_bytes(b"half")
        raise raised

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="is full: a checkpoint needs [0-9,]+ bytes, [0-9,]+ are free") as error:
        trained.save(tmp_path, 30)
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    monkeypatch.setattr(checkpoint, "save_file", lambda *_, **__: (_ for _ in ()).throw(SafetensorError("broken")))
    with pytest.raises(OSError, match="could not be written: broken"):
        trained.save(tmp_path, 30)


FULL_DISK = """
import errno, os, sys
sys.argv[1:] = [os.path.join(sys.argv[1], "run")]
from tests.txfm_model import save_forever
from txfm_model import run_state
from txfm_model.run_state import find_resume
from pathlib import Path

out = Path(sys.argv[1])
save = save_forever.saver()
save(out, 1)
run_state.check_room = lambda folder, needed: None  # as if somebody else filled the disk after it was looked at
free = os.statvfs(out).f_bavail * os.statvfs(out).f_frsize
(out / "ballast").write_bytes(b"x" * (free - 30_000))
try:
    save(out, 2)
except OSError as error:
    assert error.errno == errno.ENOSPC and "are free" in str(error), error
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [".lock", "step-00000001"]
    assert find_resume(out, "auto").name == "step-00000001"
    (out / "ballast").unlink()
    save(out, 2)
    assert find_resume(out, "auto").name == "step-00000002"
    print("as it should be")
"""


def test_a_disk_that_is_really_full(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    inside = 'mount -t tmpfs -o size=2m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    can_mount = (
        shutil.which("unshare")
        and not subprocess.run(
            [*command, 'mount -t tmpfs none "$1"', "sh", folder], capture_output=True, check=False
        ).returncode
    )
    if not can_mount:
        pytest.skip("this system lets nobody mount a small disk")
    done = subprocess.run(
        [*command, inside, "sh", folder, sys.executable, FULL_DISK],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "as it should be", done.stderr


def test_a_folder_that_cannot_be_made(trained, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(FileExistsError, match="checkpoints"):
        trained.save(tmp_path, 1)
    with pytest.raises(NotADirectoryError, match="checkpoints"):
        trained.save(tmp_path / "checkpoints", 1)


# ---- leftovers and old ones


def hidden(out: Path, what: str, step: int = 30) -> Path:
    path = out / CHECKPOINTS / f".step-{step:08d}.0123abcd.{what}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"half")
    return path


def test_leftovers_of_killed_runs_go_and_nothing_else(two, trained, tmp_path):
    left = [hidden(tmp_path, "partial"), hidden(tmp_path, "removed", 5), hidden(tmp_path, "replaced", 10)]
    others = tmp_path / CHECKPOINTS / ".notes", tmp_path / CHECKPOINTS / "mine.partial"
    for path in others:
        path.mkdir()
    assert sorted(remove_leftovers(tmp_path)) == sorted(left)
    assert names(tmp_path) == [".notes", "mine.partial", "step-00000010", "step-00000020"]
    assert remove_leftovers(tmp_path / "nowhere") == []
    assert not (tmp_path / "nowhere").exists()
    hidden(tmp_path, "partial")
    trained.save(tmp_path, 30)
    assert ".step-00000030.0123abcd.partial" not in names(tmp_path)


def test_a_checkpoint_that_a_kill_caught_between_two_renames_comes_back(two, tmp_path, caplog):
    before = contents(two[1])
    two[1].rename(two[1].with_name(".step-00000020.0123abcd.replaced"))
    assert find_resume(tmp_path, "auto") == two[0]
    assert remove_leftovers(tmp_path) == []
    assert "it is back" in caplog.text
    assert find_resume(tmp_path, "auto") == two[1]
    assert contents(two[1]) == before


def test_a_living_process_keeps_what_it_is_writing(two, trained, tmp_path, monkeypatch):
    left = hidden(tmp_path, "partial")
    with (tmp_path / CHECKPOINTS / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert remove_leftovers(tmp_path) == []
        assert left.exists()
        monkeypatch.setattr(disk, "LOCK_WAIT_S", 0.2)
        with pytest.raises(OSError, match="another process has been writing a checkpoint there for 0.2 s"):
            trained.save(tmp_path, 30)
        assert left.exists()
    trained.save(tmp_path, 30)
    assert not left.exists()


def test_a_file_system_without_locks_is_written_to_all_the_same(two, trained, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    left = hidden(tmp_path, "partial")
    assert trained.save(tmp_path, 30).exists()
    assert remove_leftovers(tmp_path) == []
    assert left.exists()  # it may be somebody's


def test_old_ones_go_when_enough_sound_newer_ones_are_there(trained, tmp_path):
    folders = [trained.save(tmp_path, step) for step in (1, 2, 3, 4, 5)]
    (folders[4] / "optimizer.safetensors").write_bytes(b"")
    assert remove_old(tmp_path, 2, step=LAST) == [folders[1], folders[0]]
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    assert remove_old(tmp_path, 2, step=LAST) == []
    (folders[3] / "resume.json").unlink()
    assert remove_old(tmp_path, 1, step=LAST) == []
    assert find_resume(tmp_path, "auto") == folders[2]
    (folders[2] / "resume.json").unlink()
    assert remove_old(tmp_path, 1, step=LAST) == []  # nothing sound: whatever is there may be mended by hand
    assert len(names(tmp_path)) == 3
    with pytest.raises(ValueError, match="at least 1"):
        remove_old(tmp_path, 0, step=LAST)
    assert remove_old(tmp_path / "nowhere", 1, step=LAST) == []


def test_checkpoints_of_later_steps_neither_count_nor_go(trained, tmp_path):
    """A run went back to step 1 of 5 and has written step 2 anew."""
    for step in (1, 2, 3, 5):
        trained.save(tmp_path, step)
    assert [folder.name for folder in remove_old(tmp_path, 1, step=2)] == ["step-00000001"]
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000005"]


def test_what_a_kill_left_of_the_end_of_a_run_goes(tmp_path):
    left = tmp_path / ".checkpoint.0a1b2c3d.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint").mkdir()
    assert remove_leftovers(tmp_path) == [left]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(two, tmp_path, monkeypatch):
    monkeypatch.setattr(run_state.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_old(tmp_path, 1, step=LAST)
    monkeypatch.undo()
    assert not two[0].exists()
    assert len(remove_leftovers(tmp_path)) == 1
    assert names(tmp_path) == ["step-00000020"]


# ---- kill -9


def kill_while_saving(out: Path, *, kills: int, seed: int) -> list[str]:
    """Kill a process that saves without end at random moments; returns what the kills left beside sound ones."""
    command = [sys.executable, "-m", "tests.txfm_model.save_forever", str(out), str(kills), str(seed)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "passing over" not in done.stderr  # a checkpoint is whole, or has no name
    newest = 3  # there before the first kill
    rounds = json.loads(done.stdout)["rounds"]
    for one in rounds:
        assert one["found"] >= max(newest, one["said"])  # what was said to be saved is there
        assert one["is_whole"]
        assert one["left"] == []
        newest = one["found"]
    assert newest > 3
    return [suffix for one in rounds for suffix in one["hidden"]]


def test_a_kill_while_saving_never_loses_what_was_saved(tmp_path):
    kill_while_saving(tmp_path, kills=5, seed=0)


@pytest.mark.slow
def test_thirty_kills_while_saving(tmp_path):
    assert ".partial" in kill_while_saving(tmp_path, kills=30, seed=1)  # some hit the middle of a save


# ---- the same run


def leaves(tree: dict, where: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return flat


def changed(key: str) -> dict:
    """The configuration as plain values, with one of them changed."""
    tree = to_tree(train_config())
    node = tree
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    value = node[last]
    node[last] = (
        not value
        if isinstance(value, bool)
        else 7
        if value is None
        else f"{value}x"
        if isinstance(value, str)
        else value + 1
    )
    return tree


KEYS = list(leaves(to_tree(train_config())))


@pytest.mark.parametrize("key", KEYS)
def test_what_decides_the_weights_must_be_equal(key, caplog):
    saved = changed(key)
    if key in MAY_DIFFER:
        check_same_run(saved, train_config())
        assert ("losses go on within rounding" in caplog.text) == (key == "loop.precision")
        return
    with pytest.raises(ValueError, match="the saved run is another one") as error:
        check_same_run(saved, train_config())
    assert f"{key}: saved {leaves(saved)[key]!r}, now {leaves(to_tree(train_config()))[key]!r}" in str(error.value)


def test_what_may_differ_is_a_setting():
    assert MAY_DIFFER <= set(KEYS)
    decisive = {key.split(".")[0] for key in KEYS if key not in MAY_DIFFER}
    assert decisive == {"model", "mask", "optim", "loss", "loop", "init"}
    assert {key for key in KEYS if key.startswith("loop.") and key not in MAY_DIFFER} == {
        "loop.steps", "loop.epochs", "loop.global_batch", "loop.seed",
    }  # fmt: skip


def test_all_that_differs_is_listed_also_what_is_absent():
    saved = to_tree(train_config())
    saved["optim"]["lr"] = 0.5
    del saved["model"]["heads"]
    saved["new"] = 1
    with pytest.raises(ValueError, match="another one") as error:
        check_same_run(saved, train_config())
    for words in ("optim.lr: saved 0.5, now 0.001", "model.heads: saved 'absent'", "new: saved 1, now 'absent'"):
        assert words in str(error.value)
    check_same_run(to_tree(train_config()), train_config())
