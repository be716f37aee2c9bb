"""LoRA factors hold a slice's change bit for bit; smaller ranks are the best ones; ours are read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from slicefine.errors import ConfigError, UnsupportedError
from slicefine.functional import read_block, write_block
from slicefine.geometry import Slice
from slicefine.journal import Journal
from slicefine.lora import exact_rank, lora_factors, read_factors, truncate

SHAPE = (9, 7)
BLOCKS = [
    *(Slice("row", start, 2) for start in (0, 1, 4, 7)),
    *(Slice("column", start, 2) for start in (0, 3, 5)),
]


def trained(blocks, shape=SHAPE, seed=0):
    """The changes of a journal that visited ``blocks``, as the product reads them, and the dense change."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    weight, journal = base.clone(), Journal()
    for block in blocks:
        values = journal.begin(weight, block)
        write_block(weight, block, values + torch.randn(values.shape, generator=generator))
    dense = weight - base
    journal.revert(weight)
    return journal.deltas(weight), dense


@given(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6))
def test_the_product_is_the_change_bit_for_bit(blocks):
    parts, dense = trained(blocks)
    A, B = lora_factors(parts, SHAPE)
    assert torch.equal(B @ A, dense)
    assert A.shape[0] == exact_rank(blocks, SHAPE) <= min(SHAPE)
    lines = {(b.axis, i) for b in blocks for i in b.indices()}
    assert A.shape[0] == min(len(lines), *SHAPE)


@given(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3), st.integers(0, 3))
def test_our_factors_are_read_back(blocks, padding):
    parts, dense = trained(blocks)
    A, B = lora_factors(parts, SHAPE)
    A = torch.cat([A, A.new_zeros(padding, SHAPE[1])])
    B = torch.cat([B, B.new_zeros(SHAPE[0], padding)], dim=1)
    again = torch.zeros(SHAPE)
    found = read_factors(A, B)
    for block, values in found:
        write_block(again, block, read_block(again, block) + values)
    assert torch.equal(again, dense)
    starts = [(block.axis, block.start + block.width) for block, _ in found]
    assert not set(starts) & {(block.axis, block.start) for block, _ in found}  # neighbours are one block


def test_factors_of_others_are_not_slices():
    torch.manual_seed(0)
    assert read_factors(torch.randn(2, 7), torch.randn(9, 2)) is None


def test_tall_and_wide_matrices_with_most_lines_changed():
    for shape in ((4, 9), (9, 4)):
        blocks = [Slice("row", 0, 3), Slice("column", 0, 3)]
        parts, dense = trained(blocks, shape)
        A, B = lora_factors(parts, shape)
        assert A.shape[0] == 4
        assert torch.equal(B @ A, dense)


def test_a_random_mask_is_refused():
    with pytest.raises(UnsupportedError, match="random mask's entries lie in all rows and columns.*slicefine merge"):
        lora_factors([(Slice("entries", 0, 4), torch.ones(1, 4))], SHAPE)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncation_is_the_singular_value_decompositions(rank):
    parts, dense = trained(BLOCKS[:2] + BLOCKS[-1:])
    A, B, kept = truncate(*lora_factors(parts, SHAPE), rank)
    u, s, v = np.linalg.svd(dense.double().numpy())  # the oracle
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert (A.shape, B.shape) == ((rank, 7), (9, rank))
    assert_close(B @ A, torch.from_numpy(best).float(), rtol=1e-4, atol=1e-5)
    energy = (s[:rank] ** 2).sum() / (s**2).sum()
    assert kept == pytest.approx(energy, rel=1e-6)
    difference = (dense - B @ A).double().square().sum() / dense.double().square().sum()
    assert 1 - kept == pytest.approx(float(difference), abs=1e-6)


def test_truncation_of_what_is_small_or_zero():
    A, B = lora_factors(trained(BLOCKS[:1])[0], SHAPE)
    assert truncate(A, B, 5)[2] == 1.0
    assert truncate(torch.zeros(3, 7), torch.zeros(9, 3), 1)[2] == 1.0
    with pytest.raises(ConfigError, match="rank=0 must be at least 1"):
        truncate(A, B, 0)
