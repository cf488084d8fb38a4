"""Linear probe: how much of a label can be read off an embedding by a linear classifier on other batches."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


@dataclass(frozen=True)
class Split:
    """Samples of a probe.

    train, test : int64 row numbers, ascending.  is_by_batch : False when there was one batch only, so that
    train and test share it and the score is too good.
    """

    train: np.ndarray
    test: np.ndarray
    is_by_batch: bool


def split_samples(
    labels: Sequence[object] | np.ndarray,
    batches: Sequence[object] | np.ndarray | None = None,
    *,
    test_share: float = 0.25,
    seed: int = 0,
) -> Split:
    """Hold out ceil(test_share x batches) whole batches; with one batch or none given, a share of each label.

    A label with a single sample stays in train when the split is by label.

    Raises
    ------
    ValueError
        If the lengths differ, there are fewer than two samples, or the share leaves train or test empty.
    """
    classes = np.asarray(labels)
    n = len(classes)
    if not 0 < test_share < 1:
        raise ValueError(f"probe: test_share must be between 0 and 1, got {test_share}")
    if batches is not None and len(batches) != n:
        raise ValueError(f"probe: {n} labels but {len(batches)} batches; expected one of each per sample")
    rng = np.random.default_rng(seed)
    names = np.unique(np.asarray(batches)) if batches is not None else np.empty(0)
    if len(names) > 1:
        held = rng.permutation(names)[: min(math.ceil(test_share * len(names)), len(names) - 1)]
        in_test = np.isin(np.asarray(batches), held)
    else:
        in_test = np.zeros(n, bool)
        for label in np.unique(classes):
            members = rng.permutation(np.flatnonzero(classes == label))
            in_test[members[: min(len(members) - 1, max(1, round(test_share * len(members))))]] = True
    if in_test.all() or not in_test.any():
        raise ValueError(f"probe: {n} samples of {len(np.unique(classes))} labels cannot be split into train and test")
    return Split(np.flatnonzero(~in_test), np.flatnonzero(in_test), is_by_batch=len(names) > 1)


def macro_f1(truth: np.ndarray, predicted: np.ndarray, *, true_classes_only: bool = False) -> float:
    """Mean F1 over the classes in truth or prediction; a class never found, or never true, counts 0.

    true_classes_only : leave out the classes that were predicted but never true.
    """
    labels = np.unique(truth) if true_classes_only else None
    return float(f1_score(truth, predicted, average="macro", labels=labels, zero_division=0))


def linear_probe(
    embedding: np.ndarray | sp.csr_matrix,
    labels: Sequence[object] | np.ndarray,
    batches: Sequence[object] | np.ndarray | None = None,
    *,
    test_share: float = 0.25,
    seed: int = 0,
    max_iter: int = 1000,
    name: str = "embedding",
) -> dict[str, Any]:
    """Standardise on train, fit multinomial logistic regression there, score the test samples.

    Parameters
    ----------
    embedding : (n, d), dense or CSR; a sparse one is scaled but not centred.
    labels : (n,) what is to be told apart.
    batches : (n,) kept whole by the split; see `split_samples`.
    name : what errors call the embedding.

    Returns
    -------
    dict, ready for JSON: accuracy, macro_f1 (classes in truth or prediction), macro_f1_true_classes,
    test_share_of_unseen_classes (test samples whose class is not in train: they count as errors), split
    ("batch" or "label"), sizes, and whether the solver converged.

    Raises
    ------
    ValueError
        On NaN or infinity, on lengths that differ, or if train holds a single class.
    """
    classes = np.asarray(labels).astype(str)
    if embedding.ndim != 2 or embedding.shape[0] != len(classes):
        raise ValueError(f"{name}: shape {embedding.shape}, expected one row for each of the {len(classes)} labels")
    _check_finite(embedding, name)
    split = split_samples(classes, batches, test_share=test_share, seed=seed)
    known = np.unique(classes[split.train])
    if len(known) < 2:
        raise ValueError(f"{name}: the train part holds the single class {known[0]!r}; a probe needs at least two")
    scaler = StandardScaler(with_mean=not sp.issparse(embedding))
    model = make_pipeline(scaler, LogisticRegression(max_iter=max_iter, random_state=seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as `converged`
        model.fit(embedding[split.train], classes[split.train])
    truth, predicted = classes[split.test], model.predict(embedding[split.test])
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": macro_f1(truth, predicted),
        "macro_f1_true_classes": macro_f1(truth, predicted, true_classes_only=True),
        "test_share_of_unseen_classes": float(np.mean(~np.isin(truth, known))),
        "majority_accuracy": _majority_accuracy(classes[split.train], truth),
        "split": "batch" if split.is_by_batch else "label",
        "n_train": len(split.train),
        "n_test": len(split.test),
        "n_classes": len(np.unique(classes)),
        "converged": bool(model[-1].n_iter_.max() < max_iter),
        "seed": seed,
    }


def _majority_accuracy(train: np.ndarray, truth: np.ndarray) -> float:
    """Accuracy of always naming the commonest class of train."""
    names, counts = np.unique(train, return_counts=True)
    return float(np.mean(truth == names[counts.argmax()]))


def _check_finite(embedding: np.ndarray | sp.csr_matrix, name: str) -> None:
    if not sp.issparse(embedding):
        bad = np.flatnonzero(~np.isfinite(embedding).all(axis=1))
    else:
        csr = sp.csr_matrix(embedding)
        bad = np.unique(np.searchsorted(csr.indptr, np.flatnonzero(~np.isfinite(csr.data)), side="right") - 1)
    if len(bad):
        raise ValueError(
            f"{name}: NaN or infinity in {len(bad)} of {embedding.shape[0]} samples, first in rows {bad[:5].tolist()}"
        )
