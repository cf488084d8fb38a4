"""Which genes a view shows, memory that does not grow with the input, and options that a model cannot serve."""

import socket
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp

from txfm_data.vocabulary import GeneStatistics
from txfm_model.config import ModelConfig
from txfm_model.embed import embed_samples
from txfm_model.embedding.encoding import (
    EncodeOptions,
    check_options,
    n_views,
    over_samples,
    parse_layer,
    part_of_matrix,
)
from txfm_model.embedding.processes import Processes
from txfm_model.embedding.samples import Panel, Part
from txfm_model.embedding.staging import compute_parts, computed_parts, staged
from txfm_model.model import TxFM

N_VARS = 30


@pytest.fixture
def samples():
    rng = np.random.default_rng(5)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(0.4, 3.0, (23, N_VARS))).astype(np.float32))
    token_ids = rng.permutation(40)[:N_VARS].astype(np.int32)
    return counts, token_ids, np.asarray(counts.sum(1), np.float64).ravel() + 50.0


def shown_of(model, samples, options) -> list[tuple[np.ndarray, np.ndarray]]:
    """Genes and values that the encoder is shown, one pair for each batch and view."""
    part, panel = part_of_matrix(model, *samples)
    seen = []

    def compute(gene_ids_BK, values_BK, panel):
        seen.append((gene_ids_BK.numpy().copy(), values_BK.numpy().copy()))
        return np.zeros((len(gene_ids_BK), 1), np.float32)

    over_samples(model, part, [panel], options, 1, compute)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_view_shows_genes_once_with_their_own_values(tiny_model, statistics, samples, temperature):
    tiny_model.statistics = statistics
    counts, token_ids, size = samples
    options = EncodeOptions(n_unmasked=9, views=3, seed=2, temperature=temperature, batch_size=50)
    seen = shown_of(tiny_model, samples, options)
    assert len(seen) == 3
    column_of = {int(token): column for column, token in enumerate(token_ids)}
    dense = counts.toarray()
    for genes, values in seen:
        assert genes.shape == (23, 9)
        for b in range(23):
            assert len(set(genes[b])) == 9
            raw = np.array([dense[b, column_of[int(gene)]] for gene in genes[b]], np.float64)
            np.testing.assert_array_equal(values[b], np.log1p(raw * (1e5 / size[b])).astype(np.float32))
    assert not any(np.array_equal(np.sort(seen[0][0], 1), np.sort(other[0], 1)) for other in seen[1:])


def test_the_first_view_is_the_draw_without_views(tiny_model, samples):
    one = shown_of(tiny_model, samples, EncodeOptions(n_unmasked=9, seed=2, batch_size=50))
    many = shown_of(tiny_model, samples, EncodeOptions(n_unmasked=9, views=2, seed=2, batch_size=50))
    np.testing.assert_array_equal(one[0][0], many[0][0])


def test_panels_are_not_mixed_and_samples_without_counts_are_nan(tiny_model):
    panels = [
        Panel(name=name, measured=np.array(genes), shown=np.array(genes), n_genes=len(genes), n_obs=3)
        for name, genes in (("a", [1, 4, 6]), ("b", [0, 2, 4, 9]))
    ]
    part = Part(
        start=0, row_id=np.arange(5), indptr=np.array([0, 1, 2, 2, 4, 5]), token_ids=np.array([4, 9, 1, 6, 0]),
        counts=np.array([1, 2, 3, 4, 5]), library_size=np.array([1.0, 2.0, 0.0, 7.0, 5.0]), panel_id=np.array([0, 1, 1, 0, 1]),
    )  # fmt: skip
    seen = []

    def compute(gene_ids_BK, values_BK, panel):
        seen.append((panel.name, gene_ids_BK.tolist(), (values_BK > 0).tolist()))
        return values_BK.sum(1, keepdim=True).numpy()

    found = over_samples(tiny_model, part, panels, EncodeOptions(), 1, compute)
    assert seen == [
        ("a", [[1, 4, 6]] * 2, [[False, True, False], [True, False, True]]),
        ("b", [[0, 2, 4, 9]] * 2, [[False, False, False, True], [True, False, False, False]]),
    ]
    assert np.isnan(found[2]).all() and np.isfinite(found[[0, 1, 3, 4]]).all()


def test_values_without_scaling_are_of_the_counts(vocabulary, samples):
    config = ModelConfig(width=16, blocks=1, heads=2, preprocessing="log1p")
    (_, values), *_ = shown_of(TxFM(config, vocabulary), samples, EncodeOptions(batch_size=50))
    counts, token_ids, _ = samples
    np.testing.assert_array_equal(
        values, np.log1p(counts.toarray().astype(float)[:, np.argsort(token_ids)]).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "views must be at least 1"), ({"n_unmasked": 0}, "n_unmasked must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"), ({"views": 2}, "give n_unmasked too"),
        ({"precision": "fp8"}, "precision must be"), ({"seed": -1}, "seed must be"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        EncodeOptions(**options)


def test_options_that_this_model_cannot_serve(tiny_model, statistics):
    for layer in (-1, 8):
        with pytest.raises(ValueError, match="take 0 to 3 for its encoder, up to 7 for its decoder, or final"):
            check_options(tiny_model, EncodeOptions(layer=layer))
    with pytest.raises(ValueError, match="draw uniformly"):
        check_options(tiny_model, EncodeOptions(n_unmasked=5, temperature=1.0))
    zeros = np.zeros(40, np.int64)
    tiny_model.statistics = GeneStatistics(zeros, zeros, zeros.astype(float))
    with pytest.raises(ValueError, match="draw uniformly"):
        check_options(tiny_model, EncodeOptions(n_unmasked=5, temperature=1.0))
    tiny_model.statistics = statistics
    check_options(tiny_model, EncodeOptions(n_unmasked=5, temperature=1.0))
    assert [parse_layer(text) for text in ("final", "3", 4)] == ["final", 3, 4]
    with pytest.raises(ValueError, match="named by counts_layer"):
        parse_layer("counts")


def test_views_collapse_where_a_panel_is_shown_whole():
    panel = Panel(name="a", measured=np.arange(9), shown=np.arange(9), n_genes=9, n_obs=1)
    assert [n_views(EncodeOptions(n_unmasked=k, views=4), panel) for k in (8, 9, 10)] == [4, 1, 1]
    assert n_views(EncodeOptions(), panel) == 1


class _Made:
    """Samples made when they are asked for."""

    where, kind, about = "made", "store", {}

    def __init__(self, n_parts: int, rows: int) -> None:
        self.n_parts, self.n_obs, self._rows = n_parts, n_parts * rows, rows
        self.panels = (Panel(name="a", measured=np.arange(40), shown=np.arange(40), n_genes=40, n_obs=self.n_obs),)

    def rows_of(self, number: int) -> int:
        return self._rows

    def read(self, number: int) -> Part:
        n = self._rows
        ids = np.arange(number * n, (number + 1) * n)
        return Part(
            start=number * n, row_id=ids, indptr=np.arange(n + 1), token_ids=ids % 40, counts=np.ones(n),
            library_size=np.ones(n), panel_id=np.zeros(n, np.int64),
        )  # fmt: skip

    def name_of(self, position: int) -> str:
        return f"sample {position}"


def peak(source: _Made, folder, width: int) -> int:
    dtype = np.dtype(np.float32)
    processes = Processes({})
    tracemalloc.start()
    with staged(folder / "x.h5ad", processes) as stage:
        compute_parts(
            source, stage, processes, lambda part, _: np.tile(part.row_id[:, None].astype(np.float32), width), dtype,
            lambda done, total: None,
        )  # fmt: skip
        at = 0
        for rows in computed_parts(source, stage, processes, width, dtype):
            assert (rows[:, 0] == np.arange(at, at + len(rows))).all()
            at += len(rows)
        assert at == source.n_obs
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(folder.iterdir()) == []
    return most


def test_memory_does_not_grow_with_the_input(tmp_path):
    few, many = peak(_Made(2, 100), tmp_path, 64), peak(_Made(60, 100), tmp_path, 64)
    assert many < few + 60 * 100 * 64 * 4 / 10


def test_an_embedding_equals_itself_at_other_layers(tiny_model, samples):
    state = embed_samples(tiny_model, *samples, layer=3)
    final = embed_samples(tiny_model, *samples)
    import torch

    with torch.no_grad():
        np.testing.assert_allclose(tiny_model.encoder.norm(torch.from_numpy(state)).numpy(), final, atol=1e-5)
    first = embed_samples(tiny_model, *samples, layer=0)
    np.testing.assert_array_equal(first, np.tile(tiny_model.encoder.cls.detach().numpy(), (23, 1)))


def test_a_second_piece_of_work_does_not_see_what_the_first_said(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    for name, value in address.items():
        monkeypatch.setenv(name, value)

    def work(rank: int) -> list[str]:
        heard = []
        for number in ("first", "second"):
            processes = Processes({"RANK": str(rank), "WORLD_SIZE": "2"})
            if rank == 0:
                time.sleep(0.2)  # the other one asks before it is answered
                processes.publish("staging", number)
            heard.append(processes.wait_for("staging"))
            processes.part("left")
        return heard

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (0, 1))) == [["first", "second"]] * 2
