"""Linear probe: splits, scores of the specification, refusals."""

import numpy as np
import pytest
import scipy.sparse as sp

from txfm_eval.celltype import linear_probe, macro_f1, split_samples


def blobs(n: int = 200, n_classes: int = 4, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    return rng.normal(size=(n, 6)) + 6 * rng.normal(size=(n_classes, 6))[labels], np.array(
        [f"type {c}" for c in labels]
    )


@pytest.mark.parametrize(
    ("truth", "predicted", "union", "true_only"),
    [
        ([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 1], 0.383333333, 0.383333333),
        ([0, 0, 1, 1], [0, 2, 1, 1], 0.555555556, 0.833333333),
    ],
)
def test_macro_f1_of_the_specification(truth, predicted, union, true_only):
    truth, predicted = np.array(truth), np.array(predicted)
    assert macro_f1(truth, predicted) == pytest.approx(union, abs=1e-6)
    assert macro_f1(truth, predicted, true_classes_only=True) == pytest.approx(true_only, abs=1e-6)


@pytest.mark.parametrize(("n_batches", "n_test"), [(2, 1), (3, 1), (4, 1), (8, 2), (9, 3)])
def test_whole_batches_are_held_out(n_batches, n_test):
    batches = np.arange(90) % n_batches
    split = split_samples(np.zeros(90), batches, seed=3)
    assert split.is_by_batch
    assert len(set(batches[split.test])) == n_test
    assert not set(batches[split.test]) & set(batches[split.train])
    assert np.array_equal(np.sort(np.concatenate([split.train, split.test])), np.arange(90))


@pytest.mark.parametrize("batches", [None, ["only"] * 102])
def test_one_batch_is_split_by_label_and_flagged(batches):
    labels = np.array(["a"] * 80 + ["b"] * 20 + ["rare", "pair"])
    split = split_samples(labels, batches, seed=1)
    assert not split.is_by_batch
    held = labels[split.test].tolist()
    assert (held.count("a"), held.count("b"), held.count("rare")) == (20, 5, 0)


def test_probe_tells_blobs_apart_and_is_seeded():
    embedding, labels = blobs()
    batches = np.repeat(np.arange(8), 25)
    result = linear_probe(embedding, labels, batches, seed=2)
    assert result["accuracy"] > 0.98
    assert result["split"] == "batch"
    assert result["converged"]
    assert (result["n_train"], result["n_test"], result["n_classes"]) == (150, 50, 4)
    assert result == linear_probe(embedding, labels, batches, seed=2)
    assert linear_probe(sp.csr_matrix(embedding), labels, batches, seed=2)["accuracy"] > 0.98


def test_uninformative_embedding_is_near_chance():
    _, labels = blobs(400)
    result = linear_probe(np.random.default_rng(5).normal(size=(400, 6)), labels, np.arange(400) // 50)
    assert result["accuracy"] < 0.45
    assert result["majority_accuracy"] == pytest.approx(0.25, abs=0.05)


def test_classes_absent_from_train_count_as_errors_and_are_reported():
    embedding, labels = blobs(120)
    batches = np.repeat(["x", "y"], 60)
    split = split_samples(labels, batches, seed=0)
    labels[split.test[:15]] = "new"
    result = linear_probe(embedding, labels, batches, seed=0)
    assert result["test_share_of_unseen_classes"] == 0.25
    assert result["accuracy"] <= 0.75


def test_solver_that_does_not_converge_is_reported():
    embedding, labels = blobs()
    assert not linear_probe(embedding, labels, max_iter=1)["converged"]


@pytest.mark.parametrize("sparse", [False, True])
def test_nan_is_refused_by_row(sparse):
    embedding, labels = blobs()
    embedding[7, 3] = np.nan
    embedding = sp.csr_matrix(embedding) if sparse else embedding
    with pytest.raises(ValueError, match=r"X_txfm: NaN or infinity in 1 of 200 samples, first in rows \[7\]"):
        linear_probe(embedding, labels, name="X_txfm")


def test_other_bad_input_is_refused():
    embedding, labels = blobs(20)
    with pytest.raises(ValueError, match="one row for each of the 19 labels"):
        linear_probe(embedding, labels[:19])
    with pytest.raises(ValueError, match="20 labels but 3 batches"):
        linear_probe(embedding, labels, ["a", "b", "c"])
    with pytest.raises(ValueError, match="test_share must be between 0 and 1"):
        linear_probe(embedding, labels, test_share=1.0)
    with pytest.raises(ValueError, match="single class"):
        linear_probe(embedding, ["same"] * 20)
    with pytest.raises(ValueError, match="cannot be split"):
        split_samples(["a", "b"])
