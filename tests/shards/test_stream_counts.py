"""Raw counts, values that are not scaled, and batches cut into parts."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from shards.manifest import Corpus
from shards.stream import MaskedBatch, MaskedDataset, MaskedStream, validation_batches
from tests.shards.corpus_maker import make_corpus, sample_of

SETTINGS = {"seed": 11, "global_batch": 8, "n_unmasked": 20}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus(make_corpus(tmp_path_factory.mktemp("counts") / "plain"))


def counts_of(batch: MaskedBatch) -> np.ndarray:
    """The counts that the samples of a batch were made with."""
    pairs = zip(batch.sample_id.tolist(), batch.panel_id.tolist(), strict=True)
    return np.concatenate([sample_of(sample, dataset).counts for sample, dataset in pairs]).astype(np.float32)


def test_counts_come_as_they_are(corpus):
    for batches in (
        MaskedStream(corpus, **SETTINGS, raw_counts=True).epoch(0),
        validation_batches(corpus, seed=1, batch_size=5, n_unmasked=20, raw_counts=True),
        DataLoader(MaskedDataset(corpus.files.address, **SETTINGS, raw_counts=True), batch_size=None),
    ):
        found = [(batch.raw_counts.clone(), counts_of(batch)) for batch in batches]
        assert len(found) > 3
        for raw, expected in found:
            np.testing.assert_array_equal(raw.numpy(), expected)
    assert next(MaskedStream(corpus, **SETTINGS).epoch(0)).raw_counts is None


def test_scaled_and_unscaled_values(corpus):
    scaled, plain = (MaskedStream(corpus, **SETTINGS, scale_library=s, raw_counts=True).epoch(0) for s in (True, False))
    for a, b in zip(scaled, plain, strict=True):
        assert torch.equal(a.gene_ids, b.gene_ids)  # the same genes are shown
        assert torch.equal(a.library_size, b.library_size)
        torch.testing.assert_close(b.target_counts, b.raw_counts)
        of_nonzero = a.library_size.repeat_interleave(a.target_indptr.diff())
        torch.testing.assert_close(a.target_counts.double(), 1e5 * a.raw_counts / of_nonzero, rtol=1e-6, atol=0)
        seen = b.values > 0
        assert torch.equal(seen, a.values > 0)
        counts_BK = torch.expm1(b.values.double())
        torch.testing.assert_close(counts_BK[seen], counts_BK[seen].round(), rtol=1e-5, atol=1e-5)
        expected = torch.log1p(1e5 * counts_BK.round() / a.library_size[:, None])
        torch.testing.assert_close(a.values.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_of_a_batch_are_the_batch(corpus, parts):
    batch = next(MaskedStream(corpus, **SETTINGS, raw_counts=True).epoch(0))
    cut = batch.split(parts)
    assert [len(part) for part in cut] == [8 // parts] * parts
    for name in (
        "gene_ids",
        "values",
        "n_unmasked",
        "panel_id",
        "sample_id",
        "library_size",
        "target_gene_ids",
        "raw_counts",
    ):
        assert torch.equal(torch.cat([getattr(part, name) for part in cut]), getattr(batch, name)), name
    assert torch.equal(torch.cat([part.target_indptr.diff() for part in cut]), batch.target_indptr.diff())
    assert {(part.target_indptr[0].item(), part.epoch, part.number) for part in cut} == {(0, 0, 0)}
    with pytest.raises(ValueError, match="8 samples cannot be cut into 3"):
        batch.split(3)


def test_only_parts_with_padding_say_so(corpus):
    """Panels of 400 and of 200 genes; 300 are shown."""
    for batch in MaskedStream(corpus, seed=11, global_batch=8, n_unmasked=300).epoch(0):
        for part in batch.split(8):
            assert part.is_padded == (part.panel_id.item() == 1)
