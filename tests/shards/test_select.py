"""What goes into a corpus: settings, genes, and which samples are held out."""

import anndata as ad
import numpy as np
import pytest

from shards.select import ShardConfig, hold_out, select
from txfm_data.store.opening import open_store


def codes(*names: str) -> tuple[np.ndarray, tuple[str, ...]]:
    texts = sorted(set(names) | {"never there"})
    return np.array([texts.index(name) for name in names]), tuple(texts)


def test_gene_filter_counts_samples_of_each_dataset(tiny_store, tiny_files):
    chosen = select(open_store(tiny_store), ShardConfig(min_cells=3, min_cell_fraction=0.5))
    for record, panel, kept, path in zip(chosen.records, chosen.panels, chosen.kept, tiny_files, strict=True):
        adata = ad.read_h5ad(path)
        counts = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X
        expected = (counts > 0).sum(axis=0) >= max(3, np.ceil(0.5 * record.n_obs))
        assert [chosen.vocabulary.gene_ids[g] for g in panel] == sorted(adata.var_names[expected])
        assert kept == pytest.approx((counts[:, expected] > 0).sum() / (counts > 0).sum())
    assert 0 < len(chosen.vocabulary) < 90


def test_a_single_batch_is_split_by_samples_and_says_so():
    is_val, how, names = hold_out(*codes(*["one"] * 50), share=0.1, seed=0)
    assert (int(is_val.sum()), how, names) == (5, "samples", ())
    assert hold_out(*codes("a", "b"), share=0.0, seed=0)[1] == "none"
    assert hold_out(*codes("a"), share=0.5, seed=0)[1] == "none"
    is_val, how, names = hold_out(*codes("a", "b", "b"), share=0.9, seed=0)
    assert how == "batches" and len(names) == 1 and 0 < is_val.sum() < 3


@pytest.mark.parametrize("n", [2, 3, 10, 40])
def test_whole_batches_are_held_out_at_least_one_and_never_all(n):
    labels = [f"b{i % n}" for i in range(400)]
    for share in (0.01, 0.1, 0.5, 0.99):
        is_val, how, names = hold_out(*codes(*labels), share=share, seed=7)
        assert how == "batches" and len(names) == min(max(1, round(share * n)), n - 1)
        assert {label for label, val in zip(labels, is_val, strict=True) if val} == set(names)
        assert {label for label, val in zip(labels, is_val, strict=True) if not val} == set(labels) - set(names)


def test_what_is_held_out_depends_on_the_seed_and_not_on_the_numbering():
    labels = [f"b{i % 20}" for i in range(100)]
    first = hold_out(*codes(*labels), share=0.2, seed=1)
    numbers, texts = codes(*labels)
    turned = hold_out(len(texts) - 1 - numbers, texts[::-1], share=0.2, seed=1)
    assert first[2] == turned[2] and np.array_equal(first[0], turned[0])
    assert hold_out(*codes(*labels), share=0.2, seed=2)[2] != first[2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"val_batches": 1.0}, "val_batches"),
        ({"val_batches": -0.1}, "val_batches"),
        ({"min_cell_fraction": 2}, "min_cell_fraction"),
        ({"min_cells": -1}, "min_cells"),
        ({"lanes": 0}, "lanes"),
        ({"mix_blocks": 0}, "mix_blocks"),
        ({"lanes": 10**6}, "lanes"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"shard_bytes": 1}, "shard_bytes"),
        ({"block_rows": 1}, "block_rows"),
        ({"block_rows": 65_537}, "block_rows"),
        ({"target_sum": 0}, "target_sum"),
        ({"target_sum": float("nan")}, "target_sum"),
        ({"weights": {"a": 0.0}}, "weight of dataset 'a' is 0.0"),
        ({"weights": {"a": 1.5}}, "lower the weights of the others"),
        ({"weights": {"a": float("nan")}}, "weight of dataset 'a' is nan"),
        ({"weights": {"a": -0.5}}, "above 0"),
        ({"obs_columns": ("x", "x")}, "'x' is named twice"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ShardConfig(**wrong)
