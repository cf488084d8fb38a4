"""What goes into a corpus: settings and genes."""

import anndata as ad
import numpy as np
import pytest

from shards.select import ShardConfig, select
from txfm_data.store.opening import open_store


def test_gene_filter_counts_samples_of_each_dataset(tiny_store, tiny_files):
    chosen = select(open_store(tiny_store), ShardConfig(min_cells=3, min_cell_fraction=0.5))
    for record, panel, kept, path in zip(chosen.records, chosen.panels, chosen.kept, tiny_files, strict=True):
        adata = ad.read_h5ad(path)
        counts = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X
        expected = (counts > 0).sum(axis=0) >= max(3, np.ceil(0.5 * record.n_obs))
        assert [chosen.vocabulary.gene_ids[g] for g in panel] == sorted(adata.var_names[expected])
        assert kept == pytest.approx((counts[:, expected] > 0).sum() / (counts > 0).sum())
    assert 0 < len(chosen.vocabulary) < 90


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
