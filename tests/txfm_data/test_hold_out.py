"""Which samples are held out: whole batches, the same for the same seed however batches are numbered."""

import numpy as np
import pytest

from txfm_data.hold_out import hold_out


def codes(*names: str) -> tuple[np.ndarray, tuple[str, ...]]:
    texts = sorted(set(names) | {"never there"})
    return np.array([texts.index(name) for name in names]), tuple(texts)


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
