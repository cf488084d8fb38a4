"""The model card says what the checkpoint's record says, claims no more, and is metadata that the Hub accepts."""

import json
import re

import pytest
from huggingface_hub import ModelCard, constants

from tests.hub_server import hub_server
from txfm_model.card import model_card
from txfm_model.config import CHOICES, LoopConfig, LossConfig, MaskConfig, ModelConfig, OptimConfig, TrainConfig
from txfm_model.config import config_to_dict as to_dict


def provenance_of(**training) -> dict:
    config = TrainConfig(shards="corpus.shards", out="run", **({"loop": LoopConfig(steps=7)} | training))
    return {
        "corpus_fingerprint": "c0ffee",
        "commit": "abc-dirty",
        "versions": {"torch": "2.13"},
        "training": to_dict(config),
        "results": {
            "steps": 7,
            "samples": 448,
            "processes": 2,
            "precision": "bf16",
            "val_loss": 1.5,
            "val_excess": 0.25,
        },
    }


def text_of(vocabulary, provenance: dict, config: ModelConfig | None = None) -> str:
    return model_card(config or ModelConfig(), vocabulary, 123_456, provenance)


def test_the_metadata_are_what_the_hub_reads(vocabulary):
    card = ModelCard(text_of(vocabulary, provenance_of()))
    assert card.data.library_name == "txfm"
    assert {"rna-seq", "single-cell", "transcriptomics"} <= set(card.data.tags)
    assert card.data.license is None
    assert "without a statement" in card.text
    assert card.text.lstrip().startswith("# TxFM checkpoint")


@pytest.mark.parametrize("licence", ["cc-by-4.0", "other: 'x'\ntags: [evil]", "no", "1.0"])
def test_a_licence_that_the_author_states_is_in_text_and_metadata(vocabulary, licence):
    card = ModelCard(text_of(vocabulary, provenance_of() | {"license": licence}))
    assert card.data.license == " ".join(licence.split())
    assert "evil" not in card.data.tags
    assert f"author states it: `{' '.join(licence.split())}`" in card.text


def test_the_client_finds_the_card_valid(vocabulary, monkeypatch):
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        ModelCard(text_of(vocabulary, provenance_of() | {"license": "cc-by-4.0"})).validate()
        ModelCard(text_of(vocabulary, {})).validate()
        with pytest.raises(ValueError, match="license"):
            ModelCard("---\nlicense: 3\n---\n# x").validate()
        assert hub.requests == ["POST /api/validate-yaml"] * 3


def test_the_run_is_described(vocabulary):
    text = text_of(
        vocabulary,
        provenance_of(
            loss=LossConfig(kind="smooth_l1", reduction="sum"),
            mask=MaskConfig(n_unmasked=96, temperature=0.5),
            optim=OptimConfig(lr=2e-4, clip_norm=1.0, weight_decay=0.05),
            loop=LoopConfig(steps=7, global_batch=512),
        ),
        ModelConfig(tokens="concat", decoder_blocks=1),
    )
    for part in (
        "123,456",
        vocabulary.fingerprint,
        "c0ffee",
        "7 steps, 448 samples drawn, 2 process(es), precision bf16",
        "smooth L1 (beta 1) of log1p values; sum over the measured genes",
        "96 measured genes shown, drawn with temperature 0.5",
        "512 samples a step",
        "learning rate 0.0002",
        "clipped to norm 1.0",
        "weight decay 0.05",
        "abc-dirty",
        "torch 2.13",
        "`concat`",
        "1 residual MLP blocks",
        "library size over all genes profiled in the sample",
        "| Validation loss | 1.5 |",
    ):
        assert part in text, part


@pytest.mark.parametrize("activation", CHOICES["activation"])
@pytest.mark.parametrize("kind", CHOICES["kind"])
def test_every_loss_and_activation_is_named(vocabulary, activation, kind):
    training = {"model": ModelConfig(activation=activation), "loss": LossConfig(kind=kind)}
    provenance = provenance_of(**training)
    config = TrainConfig(shards="s", out="o", loop=LoopConfig(steps=1), **training).model
    text = text_of(vocabulary, provenance, config)
    assert f"`{activation}`: " in text
    assert ("dispersion for each gene" in text) == (kind in ("nb", "zinb"))
    assert ("at most ln(1 + target sum)" in text) == (activation == "clamped_relu")
    assert re.search(r"\| Loss \| .+ over the measured genes of a sample \|", text)


def test_the_scale_of_tanh_and_the_input_are_the_models(vocabulary):
    text = text_of(vocabulary, {}, ModelConfig(tanh_scale=11.5, preprocessing="log1p"))
    assert "tanh(z / 11.5)" in text
    assert "ln(1 + count), not scaled by library size" in text
    assert "tanh(z / 10.8731)" in text_of(vocabulary, {})


def test_interruptions_are_listed_and_long_histories_cut(vocabulary):
    parts = [
        {"from_step": 0, "processes": 2, "accumulation": 1, "precision": "bf16", "device": "cuda"},
        {"from_step": 40, "processes": 1, "accumulation": 2, "precision": "no", "device": "cpu | <b>\nx"},
    ]
    text = text_of(vocabulary, provenance_of() | {"history": parts})
    assert "it was made in 2 parts." in text
    assert "| 40 | 1 | 2 | no | cpu b x |" in text
    text = text_of(vocabulary, provenance_of() | {"history": [{"from_step": i} for i in range(100)]})
    assert "made in 100 parts, the last 20 of them" in text
    assert text.count(" | unknown |\n") == 20
    assert "parts" not in text_of(vocabulary, provenance_of() | {"history": parts[:1]})


def test_a_checkpoint_of_an_unfinished_run_says_so(vocabulary):
    provenance = {key: value for key, value in provenance_of().items() if key != "results"} | {"step": 1000}
    assert "| Length | step 1000 of a run that was not finished when this was written |" in text_of(
        vocabulary, provenance
    )
    assert "not finished" not in text_of(vocabulary, provenance_of() | {"step": 7})


def test_what_a_fine_tuned_model_started_from_is_named(vocabulary):
    init = {"checkpoint": "lab/base", "shared_genes": 10, "new_genes": 3, "left_out_genes": 0}
    text = text_of(vocabulary, provenance_of() | {"init": init})
    assert "| Started from | lab/base (shared genes 10, new genes 3, left out genes 0) |" in text
    assert "Started from" not in text_of(vocabulary, provenance_of() | {"init": None})


@pytest.mark.parametrize("missing", ["training", "results", "versions", "commit"])
def test_a_record_that_lacks_a_part_still_gives_a_card(vocabulary, missing):
    provenance = {key: value for key, value in provenance_of().items() if key != missing}
    assert "## Licence" in text_of(vocabulary, provenance)
    partial = provenance_of()
    partial["training"] = {"loss": {"kind": "of a later version"}, "optim": {}, "unknown": 3}
    partial["results"] = {"steps": 3}
    assert "| Length | 3 steps |" in text_of(vocabulary, partial)


def test_a_model_without_a_record_claims_nothing(vocabulary):
    text = text_of(vocabulary, {})
    assert "saved without a record of training" in text
    assert "Nothing was measured" in text
    assert json.loads(text.partition("```json\n")[2].partition("```")[0])["model"]["width"] == 128


def test_limits_are_stated(vocabulary):
    text = " ".join(text_of(vocabulary, provenance_of()).split())
    for part in (
        "not a clinical device",
        "Predictions are not measurements",
        "raw counts of human genes",
        "no downstream evaluation",
    ):
        assert part in text
