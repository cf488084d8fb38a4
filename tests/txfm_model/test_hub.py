"""The Hub's own client pushes a model to a server on this machine and opens it; failures lose nothing and tell no token."""

import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, close_session, constants
from safetensors.torch import load

from tests.hub_server import SIGNATURE, TOKEN, Fault, HubServer, hub_server
from txfm_model.checkpoint import FILES, verify_checkpoint
from txfm_model.model import TxFM

ROOT = Path(__file__).parents[2]
# httpx2 says it of the client's own uploads
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that this process's client talks to, logged in; the client reads its address when it is imported."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield server
        close_session()


def weights_of(model: TxFM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(second[name], tensor) for name, tensor in first.items())


def change(model: TxFM) -> None:
    with torch.no_grad():
        model.head.bias += 1


def test_a_pushed_model_opens_elsewhere_with_the_same_bits(hub, tiny_model, tmp_path):
    tiny_model.provenance = {"corpus_fingerprint": "c0ffee", "versions": {}}
    done = tiny_model.push_to_hub("lab/txfm-tiny")
    assert done.oid == hub.repositories["lab/txfm-tiny"].branches["main"]
    before = weights_of(tiny_model)
    change(tiny_model)
    tiny_model.push_to_hub("lab/txfm-tiny")
    code = (
        "from safetensors.torch import save_file\n"
        "from txfm_model import TxFM\n"
        f"model = TxFM.from_pretrained('lab/txfm-tiny', revision={done.oid!r})\n"
        "save_file(model.state_dict(), 'weights.safetensors')\n"
        "print(model.push_to_hub('lab/second').oid, model.provenance)\n"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | hub.environment(tmp_path / "home")
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert are_equal(load((tmp_path / "weights.safetensors").read_bytes()), before)
    assert "c0ffee" in ran.stdout
    assert are_equal(load(hub.files("lab/second")["model.safetensors"]), before)
    assert not are_equal(load(hub.files("lab/txfm-tiny")["model.safetensors"]), before)
    assert TOKEN not in ran.stdout + ran.stderr
    assert hub.told_storage == []  # the token stays with the Hub


def test_the_files_are_those_of_a_checkpoint_and_the_card_is_ours(hub, tiny_model, tmp_path):
    tiny_model.push_to_hub("lab/model", private=True)
    files = hub.files("lab/model")
    assert sorted(files) == sorted(FILES)
    assert hub.repositories["lab/model"].private
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert verify_checkpoint(tmp_path)["model_card"] == "as written"
    assert json.loads(files["config.json"])["format"] == "txfm-checkpoint"
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "txfm"
    assert b"PytorchModelHubMixin" not in files["README.md"]
    large = {name for name, file in hub.repositories["lab/model"].commits[_tip(hub)].items() if file.sha256}
    assert large == {"model.safetensors", "vocabulary.parquet"}


def _tip(hub: HubServer) -> str:
    return hub.repositories["lab/model"].branches["main"]


def test_a_card_edited_on_the_hub_can_be_kept_and_what_is_the_same_is_not_sent_again(hub, tiny_model):
    tiny_model.push_to_hub("lab/model")
    hub.repositories["lab/model"].commits[_tip(hub)]["README.md"].content = b"---\nlicense: cc-by-4.0\n---\nmine"
    change(tiny_model)
    hub.requests.clear()
    tiny_model.push_to_hub("lab/model", ignore_patterns=["README.md"])
    assert hub.files("lab/model")["README.md"].endswith(b"mine")
    assert sum(line.startswith("PUT") for line in hub.requests) == 1  # the weights, not the vocabulary
    tiny_model.push_to_hub("lab/model")
    assert b"# TxFM checkpoint" in hub.files("lab/model")["README.md"]


def test_a_branch_is_made_where_it_is_asked_for(hub, tiny_model, tmp_path):
    tiny_model.push_to_hub("lab/model", branch="tried")
    assert hub.files("lab/model") == {}
    assert sorted(hub.files("lab/model", "tried")) == sorted(FILES)
    tiny_model.push_to_hub("lab/model", branch="tried")
    opened = TxFM.from_pretrained("lab/model", revision="tried", cache_dir=tmp_path)
    assert are_equal(opened.state_dict(), weights_of(tiny_model))


def test_an_upload_that_is_cut_is_tried_again(hub, tiny_model, caplog):
    hub.faults["PUT"] = Fault(times=1, cut=True)
    tiny_model.push_to_hub("lab/model")
    assert sum(line.startswith("PUT") for line in hub.requests) == 3
    assert sorted(hub.files("lab/model")) == sorted(FILES)


@pytest.mark.parametrize("where", ["PUT", "/preupload/", "objects/batch", "/commit/"])
def test_an_upload_that_breaks_off_leaves_what_was_there_and_says_so(hub, tiny_model, where):
    tiny_model.push_to_hub("lab/model")
    before = hub.files("lab/model")
    change(tiny_model)
    hub.faults[where] = Fault(times=99, status=403, message="the request has expired")
    with pytest.raises(OSError, match=r"lab/model: the upload broke off.*push again.*the request has expired") as error:
        tiny_model.push_to_hub("lab/model")
    assert hub.files("lab/model") == before
    told = "".join(traceback.format_exception(error.value))
    assert TOKEN not in told
    assert SIGNATURE not in told
    hub.faults.clear()
    tiny_model.push_to_hub("lab/model")
    assert are_equal(load(hub.files("lab/model")["model.safetensors"]), weights_of(tiny_model))


def test_a_hub_that_is_not_there_is_one_error(hub, tiny_model, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="lab/model: cannot be created or written to: .*refused"):
        tiny_model.push_to_hub("lab/model")


def test_a_wrong_token_is_an_error_that_does_not_tell_it(hub, tiny_model, caplog):
    wrong = "hf_ATokenThatIsNotTheRightOne00000001"
    with caplog.at_level(logging.DEBUG), pytest.raises(OSError, match="cannot be created or written to: ") as error:
        tiny_model.push_to_hub("lab/model", token=wrong)
    assert "Invalid username or password" in str(error.value)
    assert hub.repositories == {}
    told = "".join(traceback.format_exception(error.value)) + caplog.text
    assert wrong not in told
    assert TOKEN not in told


def test_nothing_about_the_token_is_logged_or_kept(hub, tiny_model, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    with caplog.at_level(logging.DEBUG, logger="huggingface_hub"):
        tiny_model.push_to_hub("lab/model", token=TOKEN)
        TxFM.from_pretrained("lab/model", cache_dir=tmp_path, token=TOKEN)
    assert TOKEN not in caplog.text
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept)


def test_weights_that_are_not_finite_are_not_published(hub, tiny_model):
    with torch.no_grad():
        tiny_model.head.bias[3] = torch.inf
    with pytest.raises(ValueError, match=r"lab/model: NaN or infinite weights in head.bias; nothing was uploaded"):
        tiny_model.push_to_hub("lab/model")
    assert hub.requests == []


def test_a_file_damaged_on_its_way_is_refused(hub, tiny_model, tmp_path):
    tiny_model.push_to_hub("lab/model")
    file = hub.repositories["lab/model"].commits[_tip(hub)]["model.safetensors"]
    flipped = bytearray(file.content)
    flipped[-3] ^= 1
    hub.large[file.sha256] = bytes(flipped)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: sha256"):
        TxFM.from_pretrained("lab/model", cache_dir=tmp_path)


def test_an_unknown_model_and_an_unknown_revision_are_errors(hub, tiny_model, tmp_path):
    with pytest.raises(OSError, match="Repository Not Found"):
        TxFM.from_pretrained("lab/nothing", cache_dir=tmp_path)
    tiny_model.push_to_hub("lab/model")
    with pytest.raises(OSError, match="Revision Not Found"):
        TxFM.from_pretrained("lab/model", revision="v9", cache_dir=tmp_path)
