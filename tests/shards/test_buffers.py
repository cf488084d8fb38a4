"""Buffers are used again once nobody refers to them, and never before."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.buffers import BufferPool
from shards.stream import _tensor

LARGE = 100_000


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_what_nobody_refers_to_is_used_again():
    pool = BufferPool()
    first = pool.take(LARGE, np.float32)
    where = address(first)
    assert address(pool.take(LARGE, np.float32)) != where
    del first
    assert address(pool.take((10, LARGE // 10), np.float32)) == where
    assert pool.take((3, 5), np.uint16).shape == (3, 5)


@pytest.mark.parametrize(
    "refer",
    [
        lambda a: a[5:9],
        lambda a: a.reshape(10, -1)[2:3].T,
        lambda a: a.view(np.uint16)[::2],
        torch.from_numpy,
        lambda a: torch.from_numpy(a).reshape(10, -1)[3],
        lambda a: torch.from_numpy(a[10:20]).detach().numpy(),
        lambda a: {"kept": [memoryview(a)]},
    ],
)
def test_whatever_refers_to_it_keeps_it(refer):
    pool = BufferPool()
    array = pool.take(LARGE, np.float32)
    where = address(array)
    kept = refer(array)
    del array
    others = [pool.take(LARGE, np.float32) for _ in range(3)]
    assert where not in {address(other) for other in others}
    del kept
    gc.collect()
    assert address(pool.take(LARGE, np.float32)) == where


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(50_000, 200_000), st.integers(0, 6)), max_size=60))
def test_no_two_living_arrays_overlap_and_the_pool_stays_small(requests):
    pool, living = BufferPool(), []
    for number, (n_bytes, n_kept) in enumerate(requests):
        array = pool.take(n_bytes, np.uint8)
        array[:] = number % 256
        living.append((number, array))
        del array
        del living[: max(0, len(living) - n_kept)]
        assert all((kept == made % 256).all() for made, kept in living)
    assert len(pool._bases) <= 2 * 8


def test_a_consumer_that_keeps_everything_has_everything():
    pool = BufferPool()
    kept = [pool.take(LARGE, np.uint8) for _ in range(200)]
    for number, array in enumerate(kept):
        array[:] = number
    assert len({address(array) for array in kept}) == 200
    assert all((array == number).all() for number, array in enumerate(kept))
    assert len(pool._bases) < 100


def test_the_storage_that_an_array_came_from_is_found_again():
    # What pinned memory relies on: PyTorch's allocator knows its own storage, and none made around the same memory.
    tensor = torch.empty((4, 5), dtype=torch.uint16)
    found = _tensor(tensor.numpy(), is_pinned=True)
    assert found.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
    array = np.arange(3)
    assert _tensor(array, is_pinned=False).data_ptr() == address(array)
