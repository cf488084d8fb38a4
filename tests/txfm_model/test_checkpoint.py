"""A checkpoint is whole or not there, opens anywhere, and is refused when anything in it is not as it was written."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from txfm_data.vocabulary import Vocabulary, write_vocabulary
from txfm_model import checkpoint
from txfm_model.checkpoint import checkpoint_info, load_checkpoint, save_checkpoint, verify_checkpoint
from txfm_model.model import TxFM

ROOT = Path(__file__).parents[2]


@pytest.fixture
def saved(tiny_model, statistics, tmp_path) -> Path:
    tiny_model.statistics = statistics
    tiny_model.provenance = {"corpus_fingerprint": "c0ffee", "commit": None, "versions": {"torch": "2"}}
    return save_checkpoint(tiny_model, tmp_path / "runs" / "model")


def rewrite_config(folder: Path, **changes) -> None:
    """Change config.json as a careful forger would: with its own checksum made to fit."""
    path = folder / "config.json"
    document = json.loads(path.read_text()) | changes
    document["sha256"] = checkpoint.sha256_of_document(document)
    path.write_text(json.dumps(document))


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_model_comes_back_as_it_was(saved, tiny_model, statistics, make_batch):
    assert sorted(p.name for p in saved.iterdir()) == sorted(checkpoint.FILES)
    opened = TxFM.from_pretrained(saved)
    assert opened.config == tiny_model.config
    assert opened.vocabulary == tiny_model.vocabulary
    assert opened.provenance == tiny_model.provenance
    assert opened.statistics.mean_log1p.tolist() == statistics.mean_log1p.tolist()
    assert not opened.training
    batch, _ = make_batch(0)
    assert torch.equal(*(model(batch.gene_ids, batch.values).log1p_BG for model in (opened, tiny_model)))
    assert all(p.requires_grad and p.is_contiguous() for p in opened.parameters())
    opened.save_pretrained(saved.parent / "again")
    for name in ("model.safetensors", "vocabulary.parquet"):
        assert (saved.parent / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_the_folder_of_a_run_is_opened_too(saved, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(saved, run / "checkpoint")
    assert TxFM.from_pretrained(run).config == TxFM.from_pretrained(saved).config
    assert checkpoint_info(run)["path"] == str(run / "checkpoint")


def test_it_opens_in_an_empty_directory(saved, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    code = f"import txfm_model; print(txfm_model.TxFM.from_pretrained({str(saved)!r}).n_parameters)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(empty)}
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == TxFM.from_pretrained(saved).n_parameters


def test_every_file_may_be_read_by_others_as_the_umask_says(saved):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "vocabulary.parquet", "config.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    for opener in (TxFM.from_pretrained, verify_checkpoint):
        with pytest.raises(ValueError, match=name):
            opener(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "vocabulary.parquet", "config.json"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_a_flipped_bit_is_refused_and_the_file_named(saved, name, share):
    path = saved / name
    flip_bit(path, min(int(share * path.stat().st_size), path.stat().st_size - 2))
    with pytest.raises(ValueError, match=name):
        TxFM.from_pretrained(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "vocabulary.parquet", "config.json"])
def test_a_file_cut_short_is_refused(saved, name):
    path = saved / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        TxFM.from_pretrained(saved)


def test_damaged_weights_with_a_checksum_that_fits_are_refused(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(b"\xff" * 64)
    files = json.loads((saved / "config.json").read_text())["files"]
    rewrite_config(saved, files=files | {"model.safetensors": checkpoint.sha256_of_file(weights)})
    for opener in (TxFM.from_pretrained, checkpoint_info):
        with pytest.raises(ValueError, match="model.safetensors is damaged"):
            opener(saved)


def test_another_vocabulary_is_refused_with_both_fingerprints(saved, tiny_model, statistics):
    ids = tiny_model.vocabulary.gene_ids
    other = Vocabulary((ids[1], ids[0], *ids[2:]), tiny_model.vocabulary.symbols)
    write_vocabulary(saved / "vocabulary.parquet", other, statistics)
    with pytest.raises(ValueError, match="not the vocabulary") as error:
        TxFM.from_pretrained(saved)
    assert other.fingerprint in str(error.value)
    assert tiny_model.vocabulary.fingerprint in str(error.value)


def test_an_unknown_format_is_refused(saved):
    rewrite_config(saved, format_version=99)
    with pytest.raises(ValueError, match="format version 99, this program reads 1"):
        TxFM.from_pretrained(saved)
    rewrite_config(saved, format="bert")
    with pytest.raises(ValueError, match="not what its name says"):
        TxFM.from_pretrained(saved)


def test_an_edited_configuration_is_refused(saved):
    text = (saved / "config.json").read_text()
    (saved / "config.json").write_text(text.replace('"target_sum": 100000.0', '"target_sum": 10000.0'))
    with pytest.raises(ValueError, match="changed after it was written"):
        TxFM.from_pretrained(saved)


@pytest.mark.parametrize("change", ["shape", "missing", "extra", "dtype"])
def test_weights_of_another_model_are_refused(saved, change):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    if change == "shape":
        tensors["head.bias"] = tensors["head.bias"][:-1].clone()
    elif change == "missing":
        del tensors["head.bias"]
    elif change == "extra":
        tensors["head.bias2"] = tensors["head.bias"].clone()
    else:
        tensors["head.bias"] = tensors["head.bias"].half()
    save_file(tensors, path)
    files = json.loads((saved / "config.json").read_text())["files"]
    rewrite_config(saved, files=files | {"model.safetensors": checkpoint.sha256_of_file(path)})
    with pytest.raises(ValueError, match="head.bias.*weights and configuration are of different models"):
        TxFM.from_pretrained(saved)


def test_an_unknown_key_of_the_model_is_refused(saved):
    model = json.loads((saved / "config.json").read_text())["model"]
    rewrite_config(saved, model=model | {"widht": 3})
    with pytest.raises(ValueError, match="widht"):
        TxFM.from_pretrained(saved)


def test_verify_finds_weights_that_are_not_finite_and_reports_the_card(saved, tiny_model, tmp_path):
    assert verify_checkpoint(saved)["model_card"] == "as written"
    (saved / "README.md").write_text("my own card")
    assert verify_checkpoint(saved)["model_card"] == "edited"
    assert TxFM.from_pretrained(saved)  # a card is for people to edit
    (saved / "README.md").unlink()
    assert verify_checkpoint(saved)["model_card"] == "missing"
    with torch.no_grad():
        tiny_model.head.bias[3] = torch.nan
    broken = save_checkpoint(tiny_model, tmp_path / "broken")
    with pytest.raises(ValueError, match="NaN or infinite weights in head.bias"):
        verify_checkpoint(broken)


def test_info(saved, tiny_model):
    info = checkpoint_info(saved)
    assert info["parameters"] == tiny_model.n_parameters
    assert info["genes"] == 40
    assert info["vocabulary_fingerprint"] == tiny_model.vocabulary.fingerprint
    assert info["corpus_fingerprint"] == "c0ffee"
    assert info["model"]["width"] == 16
    json.dumps(info)


def test_a_taken_folder_is_refused_and_left_alone(saved, tiny_model, tmp_path):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_checkpoint(tiny_model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        save_checkpoint(tiny_model, tmp_path / "file")


@pytest.mark.parametrize("broken_call", ["save_file", "write_vocabulary", "model_card", "sync_folder"])
def test_an_interruption_leaves_nothing_behind(tiny_model, tmp_path, monkeypatch, broken_call):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, broken_call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tiny_model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing_behind(tiny_model, tmp_path, monkeypatch):
    def fill_up(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_vocabulary", fill_up)
    with pytest.raises(OSError, match=f"the disk of {tmp_path} is full: a checkpoint needs .* are free") as error:
        save_checkpoint(tiny_model, tmp_path / "model")
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_of_saving_over_a_checkpoint_never_leaves_one_that_opens_wrongly(
    saved, tiny_model, monkeypatch
):
    moved = []

    def replace_once(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        shutil.move(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        tiny_model.save_pretrained(saved)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no config.json"):
        TxFM.from_pretrained(saved)
    tiny_model.save_pretrained(saved)
    assert TxFM.from_pretrained(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_places_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        TxFM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TxFM.from_pretrained(tmp_path / "nothing" / "here")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TxFM.from_pretrained("nothing_here")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        TxFM.from_pretrained(tmp_path / "weights.bin")


def test_an_id_of_the_hub_is_downloaded_with_its_revision(saved, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = TxFM.from_pretrained("lab/txfm-b", revision="abc")
    assert model.n_parameters > 0
    assert (asked["repo_id"], asked["revision"]) == ("lab/txfm-b", "abc")
    assert asked["allow_patterns"] == list(checkpoint.FILES)


def test_the_model_card_says_what_is_known_and_no_more(saved, tiny_model, tmp_path):
    card = (saved / "README.md").read_text()
    assert tiny_model.vocabulary.fingerprint in card
    assert "Nothing was measured" in card
    tiny_model.provenance |= {
        "results": {"steps": 7, "samples": 70, "processes": 1, "precision": "no", "val_loss": 1.5, "val_excess": 0.25}
    }
    card = (save_checkpoint(tiny_model, tmp_path / "other") / "README.md").read_text()
    assert "7 steps, 70 samples" in card
    assert "| Validation loss | 1.5 |" in card
    assert "no\ndownstream evaluation" in card


def test_load_checkpoint_needs_a_folder(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_checkpoint(tmp_path)
