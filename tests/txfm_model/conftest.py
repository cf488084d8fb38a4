"""What the tests of the model share: a small vocabulary, a small model, batches built by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from shards.stream import MaskedBatch
from txfm_data.vocabulary import GeneStatistics, Vocabulary
from txfm_model.config import ModelConfig
from txfm_model.model import TxFM

N_GENES = 40


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(
        tuple(f"ENSG{i:011d}" for i in range(N_GENES)), tuple(f"G{i}" if i % 5 else "" for i in range(N_GENES))
    )


@pytest.fixture(scope="session")
def statistics() -> GeneStatistics:
    rng = np.random.default_rng(3)
    measured = rng.integers(1, 100, N_GENES)
    return GeneStatistics(measured, measured // 2, rng.uniform(0, 8, N_GENES))


@pytest.fixture
def tiny_config() -> ModelConfig:
    return ModelConfig(width=16, blocks=3, heads=2, layerscale_init=0.5)


@pytest.fixture
def tiny_model(tiny_config: ModelConfig, vocabulary: Vocabulary) -> TxFM:
    return TxFM(tiny_config, vocabulary).eval()


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., tuple[MaskedBatch, torch.Tensor]]:
    """Random batch of `n` samples over random panels, with the table of panels; ids already int64, raw counts beside."""

    def make(
        seed: int, n: int = 6, n_panels: int = 3, n_genes: int = N_GENES, n_unmasked: int = 8
    ) -> tuple[MaskedBatch, torch.Tensor]:
        rng = np.random.default_rng(seed)
        panels = rng.random((n_panels, n_genes)) < 0.6
        panels[:, 0] = True
        panel_id = rng.integers(0, n_panels, n)
        target_ids, target_counts, ids, values, n_shown = [], [], [], [], []
        for panel in panel_id:
            genes = np.flatnonzero(panels[panel])
            dense = np.zeros(n_genes)
            expressed = rng.permutation(genes)[: rng.integers(0, len(genes) + 1)]
            dense[expressed] = rng.gamma(0.5, 400.0, len(expressed)) + 0.01
            target_ids.append(np.flatnonzero(dense))
            target_counts.append(dense[dense > 0])
            shown = rng.permutation(genes)[:n_unmasked]
            pad = n_unmasked - len(shown)
            ids.append(np.pad(shown, (0, pad)))
            values.append(np.pad(np.log1p(dense[shown]), (0, pad)))
            n_shown.append(len(shown))
        indptr = np.concatenate([[0], np.cumsum([len(t) for t in target_ids])])
        batch = MaskedBatch(
            gene_ids=torch.from_numpy(np.stack(ids)).long(),
            values=torch.from_numpy(np.stack(values)).float(),
            n_unmasked=torch.tensor(n_shown, dtype=torch.int32),
            panel_id=torch.from_numpy(panel_id).long(),
            target_indptr=torch.from_numpy(indptr).long(),
            target_gene_ids=torch.from_numpy(np.concatenate(target_ids)).long(),
            target_counts=torch.from_numpy(np.concatenate(target_counts)).float(),
            sample_id=torch.arange(n) + 100,
            library_size=torch.full((n,), 1000.0, dtype=torch.float64),
            is_padded=min(n_shown) < n_unmasked,
            raw_counts=torch.from_numpy(np.ceil(np.concatenate(target_counts) / 50)).float(),
        )
        return batch, torch.from_numpy(panels)

    return make
