import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocator.pruning.levels.masks import pack_mask, sparse_weight, unpack_mask


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_masks_are_packed_as_numpy_packs_them(rows, columns, seed):
    kept = np.random.default_rng(seed).random((rows, columns)) < 0.5
    mask = pack_mask(torch.from_numpy(kept))
    np.testing.assert_array_equal(mask.numpy(), np.packbits(kept, bitorder="little"))
    assert mask.dtype == torch.uint8
    np.testing.assert_array_equal(unpack_mask(mask, torch.Size((rows, columns))).numpy(), kept)


def test_the_mask_of_a_view_is_that_of_its_own_order():
    kept = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(pack_mask(kept.T), pack_mask(kept.T.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_with_values_are_decoded_in_the_dense_data_type(dtype):
    dense, kept = torch.full((2, 3), 7.0, dtype=dtype), torch.tensor([[True, False, True], [False, True, False]])
    compact = {"mask.2": pack_mask(kept), "values.2": torch.tensor([1.5, -2.0, 0.25])}
    found = sparse_weight(compact, 2, dense)
    assert torch.equal(found, torch.tensor([[1.5, 0.0, -2.0], [0.0, 0.25, 0.0]], dtype=dtype))
    assert (dense == 7.0).all()


def test_nested_masks_keep_dense_values():
    dense, removed_at = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[1, 2, 255]], dtype=torch.uint8)
    assert sparse_weight({"removed_at": removed_at}, 1, dense).tolist() == [[0.0, -2.0, 3.0]]
    assert sparse_weight({"removed_at": removed_at}, 2, dense).tolist() == [[0.0, 0.0, 3.0]]


def test_a_level_that_keeps_nothing_has_no_values():
    compact = {"mask.1": pack_mask(torch.zeros(3, 5, dtype=torch.bool)), "values.1": torch.empty(0)}
    assert not sparse_weight(compact, 1, torch.ones(3, 5)).any()
