"""`txfm impute`: predictions are the model's own, over measured and other genes, and say what they are."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from tests.conftest import GENES_A, gene_id
from tools import impute
from txfm_data.store.opening import open_store
from txfm_model.config import ModelConfig
from txfm_model.model import TxFM

CHOSEN = [gene_id(80), "G3", gene_id(10) + ".7", gene_id(40)]
"""Of the second dataset alone, of the first alone (by symbol), of the first with a version, of both."""


def make_model(store: Path, activation: str = "rect_tanh") -> TxFM:
    torch.manual_seed(1)
    config = ModelConfig(width=16, blocks=1, heads=2, decoder_blocks=1, activation=activation, layerscale_init=0.5)
    model = TxFM(config, open_store(store).vocabulary).eval()
    with torch.no_grad():
        model.head.weight.normal_()
        model.head.bias.normal_(2.0)
    return model


@pytest.fixture(scope="module", params=["rect_tanh", "softmax"])
def model(request, tiny_store) -> TxFM:
    return make_model(tiny_store, request.param)


@pytest.fixture
def run(model, tmp_path, capsys):
    folder = tmp_path / "model"
    model.save_pretrained(folder)

    def run(source, *options, out: str = "out.h5ad", code: int = 0):
        arguments = [str(source), "--model", str(folder), "--out", str(tmp_path / out), *map(str, options), "--json"]
        assert impute.main(arguments) == code
        captured = capsys.readouterr()
        if code:
            assert not (tmp_path / out).exists()
            return captured.err
        result = json.loads(captured.out)
        assert "warning: These values are predictions of a model, not measurements" in captured.err
        path = Path(result["out"])
        return result, ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)

    return run


def plain(model: TxFM, path: Path) -> np.ndarray:
    """Predictions of all genes for each sample of a file, from the definition."""
    adata = ad.read_h5ad(path)
    dense = sp.csr_matrix(adata.X).toarray().astype(np.float64)
    tokens = model.vocabulary.index_of(list(adata.var_names)).astype(np.int64)
    values = np.log1p(1e5 * dense / dense.sum(axis=1, keepdims=True)).astype(np.float32)
    measured = torch.zeros(len(dense), len(model.vocabulary), dtype=torch.bool)
    measured[:, torch.from_numpy(tokens)] = True
    measured[:, torch.from_numpy(chosen(model))] = True
    with torch.no_grad():
        ids = torch.from_numpy(np.tile(tokens, (len(dense), 1)))
        return model(ids, torch.from_numpy(values), measured_BG=measured).log1p_BG.numpy()


def chosen(model: TxFM) -> np.ndarray:
    names = [gene_id(80), gene_id(3), gene_id(10), gene_id(40)]
    return model.vocabulary.index_of(names).astype(np.int64)


def test_predictions_of_a_file(run, model, tiny_files, tmp_path):
    expected = plain(model, tiny_files[0])[:, chosen(model)]
    for out in ("a.h5ad", "a.zarr"):
        result, adata = run(tiny_files[0], "--genes", ",".join(CHOSEN), out=out)
        assert adata.layers["txfm_predicted"].dtype == np.float32
        np.testing.assert_allclose(adata.layers["txfm_predicted"], expected, atol=1e-5)
        assert adata.var_names.tolist() == [gene_id(i) for i in (80, 3, 10, 40)]
        assert adata.var["measured"].tolist() == [False, True, True, True]
        assert adata.var["symbol"].tolist() == ["G80", "G3", "G10", "G40"]
        assert (result["genes"], result["genes_measured"]) == (4, 3)
        pd.testing.assert_frame_equal(adata.obs, ad.read_h5ad(tiny_files[0]).obs)
        assert "do not test them for differential expression" in adata.uns["txfm_impute"]["warning"]
        assert adata.uns["txfm_impute"]["unit"] == "ln(1 + 100000 x count / library size)"
        assert adata.X is None
    listed = tmp_path / "genes.txt"
    listed.write_text("# mine\n" + "\n".join(CHOSEN[1:]) + "\n\n")
    _, again = run(tiny_files[0], "--genes", CHOSEN[0], "--genes-file", listed, "--dtype", "float16", out="b.h5ad")
    np.testing.assert_array_equal(again.layers["txfm_predicted"], adata.layers["txfm_predicted"].astype(np.float16))


def test_predictions_of_a_store_follow_each_panel(run, model, tiny_store, tiny_files):
    expected = np.concatenate([plain(model, path)[:, chosen(model)] for path in tiny_files])
    _, adata = run(tiny_store, "--genes", ",".join(CHOSEN))
    np.testing.assert_allclose(adata.layers["txfm_predicted"], expected, atol=1e-5)
    assert adata.var["measured"].tolist() == [False, False, False, True]
    np.testing.assert_allclose(adata.var["measured_fraction"], [48 / 112, 64 / 112, 64 / 112, 1])


def test_the_python_way_gives_the_same(run, model, tiny_files):
    adata = ad.read_h5ad(tiny_files[0])
    found = model.impute(adata, CHOSEN)
    _, expected = run(tiny_files[0], "--genes", ",".join(CHOSEN))
    np.testing.assert_allclose(found.layers["txfm_predicted"], expected.layers["txfm_predicted"], atol=1e-6)
    pd.testing.assert_frame_equal(found.var, expected.var)
    pd.testing.assert_frame_equal(found.obs, adata.obs)
    assert found.uns["txfm_impute"]["warning"] == expected.uns["txfm_impute"]["warning"]
    views = model.impute(adata, CHOSEN, n_unmasked=20, views=2, seed=3)
    again = run(
        tiny_files[0], "--genes", ",".join(CHOSEN), "--n-unmasked", 20, "--views", 2, "--seed", 3, out="v.h5ad"
    )[1]
    np.testing.assert_allclose(views.layers["txfm_predicted"], again.layers["txfm_predicted"], atol=1e-6)


def test_genes_that_are_not_there(run, tiny_files, tmp_path):
    (tmp_path / "empty.txt").write_text("# none\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for options, message in (
        (["--genes", "G33x"], "the model knows no gene G33x among its 90; did you mean G33"),
        (["--genes", "g33"], "did you mean G33"),
        (["--genes", gene_id(10)[:-1] + "x"], "the model knows no gene"),
        (["--genes", gene_id(99_999)], "the model knows no gene"),
        (["--genes", "G33,nothing_like,it"], "(2 names are unknown: nothing_like, it)"),
        (["--genes", f"G33,{gene_id(33)}"], "name the same gene"),
        ([], "no gene is named"),
        (["--genes", " , "], "no gene is named"),
        (["--genes-file", tmp_path / "empty.txt"], "no gene is named"),
        (["--genes-file", tmp_path / "bytes.txt"], "not a text file"),
        (["--genes-file", tmp_path / "none.txt"], "No such file"),
    ):  # fmt: skip
        assert message in run(tiny_files[0], *options, code=1), message


def test_a_symbol_of_two_genes_is_refused():
    from txfm_data.vocabulary import Vocabulary
    from txfm_model.impute import choose_genes

    ids = tuple(gene_id(i) for i in range(4))
    vocabulary = Vocabulary(ids, ("A", "B", "B", ""))
    assert choose_genes(vocabulary, ["A", ids[3]]).tolist() == [0, 3]
    with pytest.raises(ValueError, match=f"the symbol B names 2 genes of the model; name one of {ids[1]}, {ids[2]}"):
        choose_genes(vocabulary, ["B"])


def test_the_zero_of_measured_genes_is_shown_and_of_others_not(tiny_store, tiny_files):
    """Dropping a gene that no sample expresses changes a prediction: it was seen to be zero."""
    model = make_model(tiny_store)
    adata = ad.read_h5ad(tiny_files[0])
    dense = adata.X.toarray()
    dense[:, 5] = 0
    adata.X = sp.csr_matrix(dense)
    with_zero = model.embed(adata)
    without = model.embed(adata[:, [i for i in range(len(GENES_A)) if i != 5]].copy())
    assert not np.allclose(with_zero, without, atol=1e-5)
