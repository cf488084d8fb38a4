"""`txfm embed` on every kind of input: the same numbers from a file, AnnData in Zarr, a store and shards; nothing half-written."""

import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from tests.conftest import GENES_A, GENES_B, gene_id
from tests.zarr_files import write_zarr
from tools import embed
from txfm_data.store.opening import open_store
from txfm_data.vocabulary import GeneStatistics
from txfm_model.config import ModelConfig
from txfm_model.embed import embed_samples
from txfm_model.model import TxFM


@pytest.fixture(scope="module")
def model(tiny_store) -> TxFM:
    """An untrained model whose vocabulary is that of the store in another order, less three genes."""
    from txfm_data.vocabulary import Vocabulary

    own = open_store(tiny_store).vocabulary
    order = np.random.default_rng(0).permutation(len(own))[3:]
    vocabulary = Vocabulary(tuple(own.gene_ids[i] for i in order), tuple(own.symbols[i] for i in order))
    config = ModelConfig(width=16, blocks=2, heads=2, decoder_blocks=2, layerscale_init=0.5)
    torch.manual_seed(0)
    model = TxFM(config, vocabulary).eval()
    seen = np.arange(len(vocabulary)) + 1
    model.statistics = GeneStatistics(seen + 5, seen, np.zeros(len(seen)))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Run the verb and open what it wrote."""

    def run(source, *options, out: str = "out.h5ad"):
        arguments = [
            str(source),
            "--model",
            str(checkpoint),
            "--out",
            str(tmp_path / out),
            *map(str, options),
            "--json",
        ]
        assert embed.main(arguments) == 0
        result = json.loads(capsys.readouterr().out)
        path = Path(result["out"])
        return result, ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)

    return run


@pytest.fixture
def refused(checkpoint, tmp_path, capsys):
    """Run the verb, which must fail and leave nothing; give what it says."""

    def refused(source, *options, out: str = "new/out.h5ad", code: int = 1) -> str:
        arguments = [str(source), "--model", str(checkpoint), "--out", str(tmp_path / out), *map(str, options)]
        assert embed.main(arguments) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        folder = (tmp_path / out).parent
        assert not folder.exists() or not [p for p in folder.iterdir() if p.name.startswith((".out", "out"))]
        return captured.err

    return refused


def of_file(model: TxFM, path: Path, **options) -> np.ndarray:
    """The embedding by the function that takes a matrix."""
    adata = ad.read_h5ad(path)
    counts = sp.csr_matrix(adata.X)
    tokens = model.vocabulary.index_of(list(adata.var_names))
    sizes = np.asarray(counts.sum(axis=1), np.float64).ravel()
    return embed_samples(model, counts, tokens, sizes, **options)


def zarr_of(path: Path, folder: Path, version: int) -> Path:
    return write_zarr(ad.read_h5ad(path), folder / f"v{version}.zarr", version)


@pytest.fixture(scope="module")
def zarr_store(tmp_path_factory, tiny_files) -> Path:
    from txfm_data import ingest

    store = tmp_path_factory.mktemp("zarr_store") / "store.zarr"
    for path, name in zip(tiny_files, ("first", "second"), strict=True):
        ingest.h5ad(path, store, name, batch="batch", cell_type="cell_type", backend="zarr")
    return store


def test_zarr_of_both_versions_gives_what_h5ad_gives(run, model, tiny_files, tmp_path):
    expected = of_file(model, tiny_files[0])
    result, adata = run(tiny_files[0])
    np.testing.assert_allclose(adata.obsm["X_txfm"], expected, atol=1e-6)
    assert result["kind"] == "h5ad" and adata.n_vars == 60
    before = ad.read_h5ad(tiny_files[0]).obs
    for version in (2, 3):
        for out in (f"from{version}.h5ad", f"from{version}.zarr"):
            result, found = run(zarr_of(tiny_files[0], tmp_path / f"in.{out}", version), out=out)
            np.testing.assert_array_equal(found.obsm["X_txfm"], adata.obsm["X_txfm"])
            pd.testing.assert_frame_equal(found.obs, before)
            assert (result["kind"], found.n_vars, found.X) == ("zarr", 0, None)
    result, slim = run(tiny_files[0], out="slim.zarr")
    np.testing.assert_array_equal(slim.obsm["X_txfm"], adata.obsm["X_txfm"])
    pd.testing.assert_frame_equal(slim.obs, before)
    assert slim.uns["txfm_X_txfm"]["matrix"] == "X"


@pytest.mark.parametrize("backend", ["soma", "zarr"])
def test_a_store_gives_each_dataset_over_its_own_panel(run, model, tiny_store, zarr_store, tiny_files, backend):
    store = tiny_store if backend == "soma" else zarr_store
    expected = np.concatenate([of_file(model, path) for path in tiny_files])
    result, adata = run(store, out="all.zarr")
    np.testing.assert_allclose(adata.obsm["X_txfm"], expected, atol=1e-6)
    assert (result["kind"], result["n_obs"]) == ("store", 112)
    obs = adata.obs
    assert obs["soma_joinid"].tolist() == list(range(112)) and adata.obs_names[:2].tolist() == ["0", "1"]
    assert obs["dataset_id"].tolist() == ["first"] * 64 + ["second"] * 48
    before = [ad.read_h5ad(path).obs for path in tiny_files]
    assert obs["cell_type"].tolist() == [kind for frame in before for kind in frame["cell_type"]]
    assert obs["raw_sum"].dtype == np.float64 and obs["nnz"].dtype == np.int64

    result, one = run(store, "--dataset", "second", out="one.h5ad")
    np.testing.assert_allclose(one.obsm["X_txfm"], expected[64:], atol=1e-6)
    assert one.obs["soma_joinid"].tolist() == list(range(64, 112))

    kept = (obs["cell_type"] == "T cell").to_numpy()
    result, some = run(store, "--obs-filter", "cell_type == 'T cell'", out="some.h5ad")
    np.testing.assert_allclose(some.obsm["X_txfm"], expected[kept], atol=1e-6)
    assert some.obs["soma_joinid"].tolist() == np.flatnonzero(kept).tolist()


def test_parts_do_not_change_a_number(run, model, tiny_store, tiny_files, monkeypatch):
    _, file = run(tiny_files[0], "--n-unmasked", 20, out="file.h5ad")
    _, whole = run(tiny_store, "--n-unmasked", 20, "--views", 2)
    monkeypatch.setattr("txfm_model.embedding.inputs.PART_ROWS", 7)
    monkeypatch.setattr("txfm_model.embedding.inputs.FILE_ROWS", 9)
    monkeypatch.setattr("txfm_data.anndata_out._CHUNK_BYTES", 1000)
    monkeypatch.setattr("txfm_data.anndata_out._CHUNK_ROWS", 10)
    for out in ("parts.h5ad", "parts.zarr"):
        _, parts = run(tiny_store, "--n-unmasked", 20, "--views", 2, out=out)
        np.testing.assert_allclose(parts.obsm["X_txfm"], whole.obsm["X_txfm"], atol=1e-6)
        pd.testing.assert_frame_equal(parts.obs, whole.obs)
    _, parts = run(tiny_files[0], "--n-unmasked", 20, out="file_parts.h5ad")
    np.testing.assert_allclose(parts.obsm["X_txfm"], file.obsm["X_txfm"], atol=1e-6)


def test_shards_give_what_the_store_gives(run, model, tiny_shards, tiny_store):
    _, store = run(tiny_store, "--n-unmasked", 20, "--seed", 4)
    result, adata = run(tiny_shards, "--n-unmasked", 20, "--seed", 4, out="shards.zarr")
    ids = adata.obs["sample_id"].to_numpy()
    assert (result["kind"], sorted(ids)) == ("shards", list(range(112)))
    np.testing.assert_allclose(adata.obsm["X_txfm"], store.obsm["X_txfm"][ids], atol=1e-6)
    for own, theirs in (("dataset", "dataset_id"), ("batch", "batch"), ("library_size", "raw_sum")):
        assert adata.obs[own].tolist() == store.obs[theirs].iloc[ids].tolist(), own
    _, val = run(tiny_shards, "--n-unmasked", 20, "--seed", 4, "--split", "val", out="val.h5ad")
    is_val = (adata.obs["split"] == "val").to_numpy()
    assert 0 < is_val.sum() < 112
    np.testing.assert_array_equal(val.obsm["X_txfm"], adata.obsm["X_txfm"][is_val])


def test_views_are_draws_whose_embeddings_are_averaged(run, model, tiny_files):
    _, adata = run(tiny_files[0], "--n-unmasked", 20, "--views", 3, "--seed", 7)
    counts = sp.csr_matrix(ad.read_h5ad(tiny_files[0]).X)
    tokens = model.vocabulary.index_of([gene_id(i) for i in GENES_A])
    sizes = np.asarray(counts.sum(axis=1), np.float64).ravel()
    from txfm_data.kernels import draw_rows

    shown = np.sort(tokens[tokens >= 0])
    column_of = {int(token): column for column, token in enumerate(tokens) if token >= 0}
    total = np.zeros((64, 16), np.float32)
    for view in range(3):
        position = np.empty((64, 20), np.uint16)
        identity = np.arange(len(shown), dtype=np.uint16)
        draw_rows(7, view, np.arange(64), identity, np.empty(20, np.uint32), position)
        genes = shown[position.astype(int)]
        dense = counts.toarray()
        values = np.array([[dense[b, column_of[int(g)]] for g in genes[b]] for b in range(64)])
        values = np.log1p(1e5 * values / sizes[:, None]).astype(np.float32)
        with torch.no_grad():
            total += model.encode(torch.from_numpy(genes.astype(np.int64)), torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(adata.obsm["X_txfm"], total / 3, atol=1e-5)
    assert adata.uns["txfm_X_txfm"]["views"] == 3
    one = embed_samples(model, counts, tokens, sizes, n_unmasked=20, seed=7)
    assert not np.allclose(one, adata.obsm["X_txfm"], atol=1e-3)


def test_views_of_a_whole_panel_are_one(run, tiny_files, capsys, checkpoint, tmp_path):
    whole = run(tiny_files[0])[1].obsm["X_txfm"]
    out = str(tmp_path / "views.h5ad")
    arguments = [str(tiny_files[0]), "--model", str(checkpoint), "--out", out, "--n-unmasked", "60", "--views", "5"]
    assert embed.main(arguments) == 0
    assert "genes are shown, for n_unmasked is 60, in one view in place of 5" in capsys.readouterr().err
    np.testing.assert_array_equal(ad.read_h5ad(out).obsm["X_txfm"], whole)


def test_a_draw_at_a_temperature_favours_genes_seen_often(run, model, tiny_files, tmp_path, monkeypatch):
    """Of the model's statistics, gene i was seen in i + 1 samples: the later ones are drawn, the draws differ by row."""
    from txfm_model.embedding import encoding

    drawn = []
    view = encoding._view
    monkeypatch.setattr(encoding, "_view", lambda *args: drawn.append(view(*args)[0]) or view(*args))
    run(tiny_files[0], "--n-unmasked", 20, "--temperature", 4, "--batch-size", 64)
    run(tiny_files[0], "--n-unmasked", 20, "--batch-size", 64, out="plain.h5ad")
    hot, plain = drawn
    assert hot.shape == plain.shape == (64, 20)
    assert hot.mean() > plain.mean() + 10
    assert len({tuple(row) for row in np.sort(hot, axis=1)}) > 60
    assert all(len(set(row)) == 20 for row in hot)
    TxFM(model.config, model.vocabulary).save_pretrained(tmp_path / "bare")
    arguments = [str(tiny_files[0]), "--model", str(tmp_path / "bare"), "--out", str(tmp_path / "x.h5ad")]
    assert embed.main([*arguments, "--n-unmasked", "20", "--temperature", "1"]) == 1


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4])
def test_any_layer(run, model, tiny_files, layer):
    _, adata = run(tiny_files[0], "--layer", layer)
    counts = sp.csr_matrix(ad.read_h5ad(tiny_files[0]).X)
    sizes = np.asarray(counts.sum(axis=1), np.float64).ravel()
    tokens = model.vocabulary.index_of([gene_id(i) for i in GENES_A])
    known = np.flatnonzero(tokens >= 0)
    values = np.log1p(1e5 * counts.toarray()[:, known] / sizes[:, None]).astype(np.float32)
    ids = torch.from_numpy(np.tile(tokens[known].astype(np.int64), (64, 1)))
    with torch.no_grad():
        expected = model.encode(ids, torch.from_numpy(values), layer=layer).numpy()
    np.testing.assert_allclose(adata.obsm["X_txfm"], expected, atol=1e-4)
    assert adata.uns["txfm_X_txfm"]["layer"] == layer


def test_half_precision_output_and_bf16_autocast(run, tiny_files):
    whole = run(tiny_files[0])[1].obsm["X_txfm"]
    for out in ("half.h5ad", "half.zarr"):
        half = run(tiny_files[0], "--dtype", "float16", out=out)[1].obsm["X_txfm"]
        np.testing.assert_array_equal(half, whole.astype(np.float16))
        assert half.dtype == np.float16
    rounded = run(tiny_files[0], "--precision", "bf16", out="bf16.h5ad")[1].obsm["X_txfm"]
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, whole, atol=0.1)
    assert not np.array_equal(rounded, whole)


def test_preprocessing_without_scaling(run, model, tiny_files, tmp_path, capsys):
    """A model of ln(1 + count) is shown that; the size of the library does not enter."""
    config = ModelConfig(width=16, blocks=1, heads=2, decoder_blocks=1, preprocessing="log1p")
    plain = TxFM(config, model.vocabulary).eval()
    plain.save_pretrained(tmp_path / "plain")
    out = tmp_path / "x.h5ad"
    assert embed.main([str(tiny_files[0]), "--model", str(tmp_path / "plain"), "--out", str(out)]) == 0
    dense = ad.read_h5ad(tiny_files[0]).X.toarray()
    tokens = model.vocabulary.index_of([gene_id(i) for i in GENES_A])
    known = np.flatnonzero(tokens >= 0)
    ids = torch.from_numpy(np.tile(tokens[known].astype(np.int64), (64, 1)))
    with torch.no_grad():
        expected = plain.encode(ids, torch.from_numpy(np.log1p(dense[:, known])))
    np.testing.assert_allclose(ad.read_h5ad(out).obsm["X_txfm"], expected.numpy(), atol=1e-5)


def test_genes_few_samples_express_are_left_out_of_a_store_dataset_by_dataset(run, model, tiny_store, tiny_files):
    result, adata = run(tiny_store, "--min-cell-fraction", 0.6)
    for number, (path, rows) in enumerate(zip(tiny_files, (slice(0, 64), slice(64, 112)), strict=True)):
        source = ad.read_h5ad(path)
        counts = sp.csr_matrix(source.X)
        enough = np.asarray((counts > 0).sum(axis=0)).ravel() >= np.ceil(0.6 * source.n_obs)
        tokens = np.where(enough, model.vocabulary.index_of([gene_id(i) for i in (GENES_A, GENES_B)[number]]), -1)
        sizes = np.asarray(counts.sum(axis=1), np.float64).ravel()
        expected = embed_samples(model, counts, tokens, sizes)
        np.testing.assert_allclose(adata.obsm["X_txfm"][rows], expected, atol=1e-5)


def test_counts_in_a_layer_and_expected_counts(run, model, tiny_files, refused, tmp_path):
    adata = ad.read_h5ad(tiny_files[0])
    adata.layers["counts"] = adata.X.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    adata.layers["expected"] = adata.layers["counts"] * np.float32(0.25)
    adata.write_h5ad(tmp_path / "in.h5ad")
    write_zarr(adata, tmp_path / "in.zarr")
    for name in ("in.h5ad", "in.zarr"):
        error = refused(tmp_path / name)
        assert "is not a whole number" in error and "--counts-layer or --raw" in error and "normalized" not in error
        _, found = run(tmp_path / name, "--counts-layer", "counts", out=f"c.{name}")
        np.testing.assert_allclose(found.obsm["X_txfm"], of_file(model, tiny_files[0]), atol=1e-6)
        quarter = run(tmp_path / name, "--counts-layer", "expected", "--non-integer", "ok", out=f"e.{name}")[1]
        np.testing.assert_allclose(quarter.obsm["X_txfm"], found.obsm["X_txfm"], atol=1e-5)
    assert "no layers/nothing" in refused(tmp_path / "in.zarr", "--counts-layer", "nothing")


def test_what_is_refused(refused, tiny_files, tiny_store, tiny_shards, tmp_path, checkpoint, capsys):
    file = tiny_files[0]
    for source, options, message in (
        (tmp_path / "none.h5ad", [], "no such file"),
        (tmp_path / "none", [], "nothing there"),
        (checkpoint, [], "a checkpoint, which goes to --model"),
        (tiny_shards.parent, [], "not a TxFM store"),
        (file, ["--layer", 5], "layer 5 is none of this model's; take 0 to 2 for its encoder, up to 4"),
        (file, ["--layer", "counts"], "is named by counts_layer"),
        (file, ["--dataset", "first"], "--dataset does not apply to an h5ad file"),
        (tiny_store, ["--counts-layer", "x"], "--counts-layer does not apply to a store"),
        (tiny_store, ["--dataset", "third"], "has no dataset 'third'"),
        (tiny_store, ["--obs-filter", "cell_type == 'none'"], "no sample fits --obs-filter"),
        (tiny_shards, ["--min-cell-fraction", 0.1], "whose genes were chosen when it was built"),
        (tiny_shards, ["--dataset", "first"], "--dataset does not apply to a shard corpus"),
        (file, ["--model", tmp_path / "nothing"], "no checkpoint at"),
        (file, ["--embed-key", "a/b"], "a name without a slash"),
    ):  # fmt: skip
        assert message in refused(source, *options), message
    assert "must end in .h5ad or .zarr" in refused(file, out="new/out.parquet")
    for options, message in (
        (["--views", 0], "--views must be at least 1"), (["--n-unmasked", 0], "--n-unmasked must be at least 1"),
        (["--views", 2], "--views 2 needs --n-unmasked"), (["--batch-size", 0], "--batch-size must be at least 1"),
    ):  # fmt: skip
        assert message in refused(file, *options, code=2)
    (tmp_path / "taken.zarr").mkdir()
    assert embed.main([str(file), "--model", str(checkpoint), "--out", str(tmp_path / "taken.zarr")]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "message"), [(-1, "negative"), (np.nan, "not a finite"), (np.inf, "not a finite")])
def test_values_that_are_no_counts(refused, tiny_files, tmp_path, value, message):
    adata = ad.read_h5ad(tiny_files[0])
    adata.X.data[-1] = value
    adata.write_h5ad(tmp_path / "bad.h5ad")
    write_zarr(adata, tmp_path / "bad.zarr")
    for name in ("bad.h5ad", "bad.zarr"):
        assert message in refused(tmp_path / name)


def test_empty_samples_and_foreign_genes_in_zarr(run, refused, tiny_files, tmp_path):
    adata = ad.read_h5ad(tiny_files[0])
    dense = adata.X.toarray()
    dense[[0, 7]] = 0
    adata.X = dense
    write_zarr(adata, tmp_path / "holes.zarr")
    assert "sample 'cell0' has no count at all" in refused(tmp_path / "holes.zarr")
    result, found = run(tmp_path / "holes.zarr", "--empty-samples", "nan", out="holes.out.zarr")
    assert result["n_without_counts"] == 2 and np.isnan(found.obsm["X_txfm"][[0, 7]]).all()
    assert np.isfinite(np.delete(found.obsm["X_txfm"], [0, 7], axis=0)).all()
    adata.var_names = [f"MOUSE{i}" for i in range(60)]
    del adata.var["symbol"]
    write_zarr(adata, tmp_path / "foreign.zarr")
    assert "none of its 60 genes" in refused(tmp_path / "foreign.zarr")
    adata[:0].copy().write_h5ad(tmp_path / "nobody.h5ad")
    assert refused(tmp_path / "nobody.h5ad")


def test_a_store_of_normalised_values_and_one_without_our_genes(refused, model, tiny_files, tmp_path):
    from txfm_data import ingest

    adata = ad.read_h5ad(tiny_files[0])
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    adata.write_h5ad(tmp_path / "logged.h5ad")
    ingest.h5ad(
        tmp_path / "logged.h5ad", tmp_path / "n.zarr", "logged", values="normalized", batch="batch", backend="zarr"
    )
    assert "holds normalised values" in refused(tmp_path / "n.zarr")
    other = ad.read_h5ad(tiny_files[0])
    other.var_names = [f"ENSG{70_000_000_000 + i}" for i in range(60)]
    other.write_h5ad(tmp_path / "other.h5ad")
    for number, path in enumerate((tiny_files[0], tmp_path / "other.h5ad")):
        ingest.h5ad(path, tmp_path / "two.zarr", f"d{number}", batch="batch", backend="zarr")
    assert "none of the 60 genes that dataset 'd1' measured" in refused(tmp_path / "two.zarr")


@pytest.mark.parametrize(
    ("out", "stop"), [("new/out.h5ad", OSError(28, "No space left on device")), ("new/out.zarr", KeyboardInterrupt)]
)
def test_stopped_while_it_computes_or_writes_it_leaves_nothing(
    checkpoint, tiny_store, tmp_path, monkeypatch, capsys, out, stop
):
    from txfm_data import anndata_out
    from txfm_model.embedding import encoding, over_files

    path = tmp_path / out
    arguments = [str(tiny_store), "--model", str(checkpoint), "--out", str(path)]

    def fail(*_args, **_kwargs):
        assert list(path.parent.iterdir()), "the work has begun"
        raise stop

    for module, name in (
        (encoding, "_log1p_rows"),
        (anndata_out, "_put"),
        (anndata_out, "_write_matrix"),
        (over_files, "_publish"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            assert embed.main(arguments) == (130 if stop is KeyboardInterrupt else 1)
        assert list(path.parent.iterdir()) == [], name
    assert embed.main(arguments) == 0
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    capsys.readouterr()


def test_values_that_the_model_cannot_mean_are_refused(model, refused, tiny_files, tmp_path):
    broken = TxFM(model.config, model.vocabulary)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.encoder.cls[0] = 1e5
    broken.save_pretrained(tmp_path / "large")
    error = refused(tiny_files[0], "--model", tmp_path / "large", "--layer", 0, "--dtype", "float16")
    assert "which float16 cannot hold; pass --dtype float32" in error
    with torch.no_grad():
        broken.encoder.cls[0] = torch.nan
    broken.save_pretrained(tmp_path / "nan")
    assert "values that are not finite" in refused(tiny_files[0], "--model", tmp_path / "nan")


def test_the_input_is_left_alone(run, tiny_files, tiny_store, tmp_path):
    copy = shutil.copytree(tiny_store, tmp_path / "copy.soma")
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    run(copy)
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
