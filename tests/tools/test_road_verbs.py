"""The verbs that the lead road is made of, run as a user runs them: exit codes, --json, files, errors, nothing left behind."""

import json
import shutil
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest

from tools import embed, info, ingest, shard, verify
from txfm_model.config import ModelConfig
from txfm_model.model import TxFM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_shards) -> Path:
    """An untrained model of the tiny corpus' vocabulary: enough to embed with."""
    from shards.manifest import Corpus

    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    config = ModelConfig(width=16, blocks=1, heads=2, decoder_blocks=1)
    TxFM(config, Corpus(tiny_shards).vocabulary).save_pretrained(folder)
    return folder


def run_json(main, *arguments, capsys) -> dict:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(main, *arguments, capsys) -> str:
    assert main([*map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_ingest_shard_info_verify(tmp_path, tiny_files, capsys):
    store, corpus = tmp_path / "s.soma", tmp_path / "c.shards"
    for path, name in zip(tiny_files, ("first", "second"), strict=True):
        result = run_json(
            ingest.main, "h5ad", path, "--store", store, "--dataset", name, "--values", "counts", "--batch", "batch",
            "--cell-type", "cell_type", "--perturbation", "guide", "--control", "non-targeting", capsys=capsys,
        )  # fmt: skip
        assert (result["dataset"], result["genes_matched"], result["genes_in_file"]) == (name, 60, 60)
    built = run_json(
        shard.main, "--store", store, "--out", corpus, "--lanes", 4, "--block", 8, "--min-cells", 1, "--seed", 3,
        "--datasets", "second", "first", "--val-batches", 0.3, capsys=capsys,
    )  # fmt: skip
    assert [d["name"] for d in built["datasets"]] == ["second", "first"]
    assert built["n_train"] + built["n_val"] == 112
    shown = run_json(info.main, store, capsys=capsys)
    assert (shown["kind"], shown["n_obs"], [d["name"] for d in shown["datasets"]]) == (
        "store",
        112,
        ["first", "second"],
    )
    shown = run_json(info.main, corpus, capsys=capsys)
    assert (shown["kind"], shown["lanes"], shown["fingerprint"]) == ("shards", 4, built["fingerprint"])
    for path, kind in ((store, "store"), (corpus, "shards")):
        assert run_json(verify.main, path, capsys=capsys)["kind"] == kind
        for main in (info.main, verify.main):
            assert main([str(path)]) == 0
            assert str(path) in capsys.readouterr().out


def test_ingest_without_values_or_with_a_wrong_word_is_wrong_use(tmp_path, tiny_files, capsys):
    arguments = ["h5ad", str(tiny_files[0]), "--store", str(tmp_path / "s"), "--dataset", "d"]
    assert ingest.main(arguments) == 2
    assert "--values" in capsys.readouterr().err
    assert ingest.main([*arguments, "--values", "counts", "--gene-idz", "x"]) == 2
    assert "--gene-ids" in capsys.readouterr().err
    assert ingest.main(["h5as"]) == 2
    assert not list(tmp_path.iterdir())


def test_errors_name_the_remedy(tmp_path, tiny_files, tiny_store, capsys):
    twice = ("h5ad", tiny_files[0], "--store", tiny_store, "--dataset", "first", "--values", "counts")
    assert "dataset 'first' is there already" in refused(ingest.main, *twice, capsys=capsys)
    missing = ("h5ad", tmp_path / "no.h5ad", "--store", tiny_store, "--dataset", "x", "--values", "counts")
    assert "no such file" in refused(ingest.main, *missing, capsys=capsys)
    assert "no store there" in refused(shard.main, "--store", tmp_path / "no", "--out", tmp_path / "c", capsys=capsys)
    error = refused(
        shard.main, "--store", tiny_store, "--out", tmp_path / "c", "--shard-bytes", "1 elephant", capsys=capsys
    )
    assert "is not a size" in error
    for main in (info.main, verify.main):
        assert "nothing there" in refused(main, tmp_path / "no", capsys=capsys)
    (tmp_path / "mine").mkdir()
    assert "not a TxFM store" in refused(verify.main, tmp_path / "mine", capsys=capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("text", "expected"), [("256MiB", 2**28), ("1.5GB", 1_500_000_000), ("2097152", 2**21)])
def test_sizes(text, expected):
    assert shard.parse_size(text) == expected


def test_verify_names_a_flipped_bit(tmp_path, tiny_shards, capsys):
    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    file = copy / "val-000000.tar"
    data = bytearray(file.read_bytes())
    data[700] ^= 2
    file.write_bytes(bytes(data))
    assert "val-000000.tar: block at byte 0" in refused(verify.main, copy, capsys=capsys)


def test_embedding_adds_to_a_copy_and_changes_nothing_else(tmp_path, tiny_files, checkpoint, capsys):
    out = tmp_path / "out.h5ad"
    result = run_json(embed.main, tiny_files[0], "--model", checkpoint, "--out", out, capsys=capsys)
    assert (result["genes_matched"], result["genes_in_file"], result["obsm"], result["width"]) == (60, 60, "X_txfm", 16)
    before, after = ad.read_h5ad(tiny_files[0]), ad.read_h5ad(out)
    assert after.obs.equals(before.obs) and after.var.equals(before.var) and (after.X != before.X).nnz == 0
    assert after.obsm["X_txfm"].shape == (64, 16) and np.isfinite(after.obsm["X_txfm"]).all()
    assert after.uns["txfm_X_txfm"]["genes_matched"] == 60
    assert not np.allclose(after.obsm["X_txfm"][0], after.obsm["X_txfm"][1])
    again = tmp_path / "again.h5ad"
    run_json(
        embed.main,
        tiny_files[0],
        "--model",
        checkpoint,
        "--out",
        again,
        "--batch-size",
        5,
        "--embed-key",
        "E",
        capsys=capsys,
    )
    np.testing.assert_allclose(ad.read_h5ad(again).obsm["E"], after.obsm["X_txfm"], atol=1e-5)
    assert "exists already" in refused(embed.main, tiny_files[0], "--model", checkpoint, "--out", out, capsys=capsys)


def embedded(path: Path, checkpoint: Path, out: Path, *options) -> np.ndarray:
    assert embed.main([str(path), "--model", str(checkpoint), "--out", str(out), *options]) == 0
    return ad.read_h5ad(out).obsm["X_txfm"]


def test_symbols_versions_order_and_duplicates_do_not_change_an_embedding(tmp_path, tiny_files, checkpoint, capsys):
    """The same counts under versioned ids in another order, under symbols, and with one gene split in two columns."""
    expected = embedded(tiny_files[0], checkpoint, tmp_path / "plain.h5ad")
    adata = ad.read_h5ad(tiny_files[0])
    turned = adata[:, ::-1].copy()
    turned.var_names = [f"{gene}.{i}" for i, gene in enumerate(turned.var_names)]
    turned.write_h5ad(tmp_path / "turned.h5ad")
    named = adata.copy()
    named.var_names = named.var["symbol"].to_numpy()
    del named.var["symbol"]
    named.write_h5ad(tmp_path / "named.h5ad")
    dense = adata.X.toarray()
    half = np.column_stack([dense, np.floor(dense[:, :1] / 2)])
    half[:, 0] -= half[:, -1]
    split = ad.AnnData(half, adata.obs)
    split.var_names = [*adata.var_names, adata.var_names[0] + ".7"]
    split.write_h5ad(tmp_path / "split.h5ad")
    for name, options in (("turned", ()), ("named", ()), ("split", ("--duplicates", "sum"))):
        got = embedded(tmp_path / f"{name}.h5ad", checkpoint, tmp_path / f"{name}.out.h5ad", *options)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    capsys.readouterr()
    error = refused(
        embed.main, tmp_path / "split.h5ad", "--model", checkpoint, "--out", tmp_path / "x.h5ad", capsys=capsys
    )
    assert "--duplicates sum" in error


def test_samples_without_counts_and_library_sizes(tmp_path, tiny_files, checkpoint, capsys):
    expected = embedded(tiny_files[0], checkpoint, tmp_path / "plain.h5ad", "--n-unmasked", "20")
    adata = ad.read_h5ad(tiny_files[0])
    dense = adata.X.toarray()
    sums = dense.sum(axis=1)
    dense[[0, 7]] = 0
    adata.X = dense
    adata.obs["total"] = np.where(sums > 0, sums, 1.0)
    adata.write_h5ad(tmp_path / "holes.h5ad")
    capsys.readouterr()
    arguments = (tmp_path / "holes.h5ad", "--model", checkpoint, "--out", tmp_path / "x.h5ad")
    assert "sample 'cell0' has no count at all" in refused(embed.main, *arguments, capsys=capsys)
    options = ("--empty-samples", "nan", "--n-unmasked", "20")
    got = embedded(tmp_path / "holes.h5ad", checkpoint, tmp_path / "holes.out.h5ad", *options)
    assert np.isnan(got[[0, 7]]).all()
    np.testing.assert_allclose(np.delete(got, [0, 7], axis=0), np.delete(expected, [0, 7], axis=0), atol=1e-5)
    with_sizes = embedded(tmp_path / "holes.h5ad", checkpoint, tmp_path / "sizes.h5ad", "--library-size", "total")
    assert np.isfinite(with_sizes).all()


def test_what_cannot_be_embedded_is_refused_and_leaves_nothing(tmp_path, tiny_files, checkpoint, capsys):
    out = tmp_path / "out" / "x.h5ad"
    adata = ad.read_h5ad(tiny_files[0])
    adata.X = np.log1p(adata.X.toarray())
    adata.write_h5ad(tmp_path / "logged.h5ad")
    adata.var_names = [f"MOUSE{i}" for i in range(60)]
    adata.X = np.ones((64, 60), np.float32)
    del adata.var["symbol"]
    adata.write_h5ad(tmp_path / "foreign.h5ad")
    for path, message in (
        (tmp_path / "logged.h5ad", "not a whole number"), (tmp_path / "foreign.h5ad", "none of its 60 genes"),
        (tmp_path / "none.h5ad", "no such file"),
    ):  # fmt: skip
        assert message in refused(embed.main, path, "--model", checkpoint, "--out", out, capsys=capsys)
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (damaged / "model.safetensors").write_bytes(bytes(data))
    assert "sha256" in refused(embed.main, tiny_files[0], "--model", damaged, "--out", out, capsys=capsys)
    assert not out.exists() and not list((tmp_path / "out").glob("*") if out.parent.exists() else [])


def test_an_existing_embedding_of_that_name_is_replaced_in_the_copy_only(tmp_path, tiny_files, checkpoint):
    first = tmp_path / "first.h5ad"
    embedded(tiny_files[0], checkpoint, first)
    with h5py.File(first, "r+") as file:
        file["obsm/X_txfm"][:] = 0
    assert np.abs(embedded(first, checkpoint, tmp_path / "second.h5ad")).max() > 0
    assert not ad.read_h5ad(first).obsm["X_txfm"].any()


def test_genes_that_few_samples_express_can_be_left_out(tmp_path, tiny_files, checkpoint, capsys):
    out = tmp_path / "out.h5ad"
    dense = ad.read_h5ad(tiny_files[0]).X.toarray()
    kept = int(((dense > 0).sum(axis=0) >= np.ceil(0.6 * 64)).sum())
    arguments = (tiny_files[0], "--model", checkpoint, "--out", out, "--min-cell-fraction")
    result = run_json(embed.main, *arguments, 0.6, capsys=capsys)
    assert 0 < kept < 60 and (result["genes_matched"], result["genes_shown"]) == (60, kept)
    narrow = ad.read_h5ad(tiny_files[0])[:, (dense > 0).sum(axis=0) >= np.ceil(0.6 * 64)].copy()
    narrow.obs["total"] = dense.sum(axis=1)
    narrow.write_h5ad(tmp_path / "narrow.h5ad")
    expected = embedded(tmp_path / "narrow.h5ad", checkpoint, tmp_path / "n.h5ad", "--library-size", "total")
    np.testing.assert_allclose(ad.read_h5ad(out).obsm["X_txfm"], expected, atol=1e-5)
    assert embed.main([*map(str, arguments), "2"]) == 2
    assert "between 0 and 1" in capsys.readouterr().err
