"""Slices as integers: coverage, clamping, draws, crossings."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core_helpers import slice_mask
from slicefine.errors import ConfigError
from slicefine.geometry import (
    Slice,
    block_count,
    block_start,
    entry_indices,
    line_count,
    line_length,
    shared_entries,
    touched,
)

sizes_and_widths = st.integers(1, 60).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))


@given(sizes_and_widths)
def test_blocks_cover_everything_and_keep_their_width(case):
    size, width = case
    starts = [block_start(i, size, width) for i in range(block_count(size, width))]
    covered = [i for start in starts for i in range(start, start + width)]
    assert set(covered) == set(range(size))
    assert starts == sorted(set(starts))
    assert starts[-1] + width == size
    assert (block_count(size, width) - 1) * width < size  # no block more than needed
    assert all(b - a == width for a, b in itertools.pairwise(starts[:-1]))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**40), st.data())
def test_entry_indices_are_unique_sorted_in_range_and_repeatable(rows, columns, seed, data):
    width = data.draw(st.integers(1, rows * columns))
    draw = Slice("entries", seed, width)
    indices = entry_indices(draw, (rows, columns))
    assert indices.dtype == torch.int64
    assert indices.numel() == width
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert int(indices.min()) >= 0
    assert int(indices.max()) < rows * columns
    torch.manual_seed(seed % 1000)  # the global generator plays no part
    assert torch.equal(indices, entry_indices(draw, (rows, columns)))


def test_entry_indices_depend_on_the_seed_and_are_uniform():
    hits = torch.zeros(40)
    for seed in range(2000):
        hits[entry_indices(Slice("entries", seed, 10), (5, 8))] += 1
    # 2000 draws of 10 in 40: mean 500, standard deviation 19.4
    assert hits.sum() == 20_000
    assert (hits - 500).abs().max() < 5 * 19.4
    assert not torch.equal(
        entry_indices(Slice("entries", 1, 10), (5, 8)), entry_indices(Slice("entries", 2, 10), (5, 8))
    )


slices = st.tuples(st.sampled_from(["row", "column"]), st.integers(0, 6), st.integers(1, 4)).map(lambda t: Slice(*t))


@given(slices, slices)
def test_shared_entries_equals_brute_force(a, b):
    shape = (10, 10)
    expected = slice_mask(a, shape) & slice_mask(b, shape)
    part = shared_entries(a, b)
    found = torch.zeros(shape, dtype=torch.bool)
    if part is not None:
        lines = torch.zeros(a.width, 10, dtype=torch.bool)
        lines[part] = True
        if a.axis == "row":
            found[a.start : a.start + a.width] = lines
        else:
            found[:, a.start : a.start + a.width] = lines.t()
    assert torch.equal(found, expected)
    assert (part is None) == (not expected.any())


@given(st.lists(slices, max_size=5), st.sampled_from(["row", "column"]))
def test_touched_equals_brute_force(blocks, axis):
    assert touched(blocks, axis) == [i for i in range(12) if any(b.axis == axis and i in b.indices() for b in blocks)]


def test_line_length():
    assert [line_length(axis, (7, 3)) for axis in ("row", "column", "entries")] == [3, 7, 1]


@pytest.mark.parametrize(
    ("block", "fits"),
    [
        (Slice("row", 0, 4), True),
        (Slice("row", 3, 1), True),
        (Slice("row", 3, 2), False),
        (Slice("row", -1, 2), False),
        (Slice("row", 0, 0), False),
        (Slice("column", 4, 2), True),
        (Slice("column", 5, 2), False),
        (Slice("entries", 10**12, 24), True),
        (Slice("entries", 0, 25), False),
    ],
)
def test_check_accepts_what_fits_a_matrix_of_4_by_6(block, fits):
    if fits:
        block.check((4, 6), "fc")
    else:
        with pytest.raises(ConfigError, match=rf"fc: {block.axis} slice of width {block.width} .* shape \(4, 6\)"):
            block.check((4, 6), "fc")


def test_check_refuses_an_unknown_axis():
    with pytest.raises(ConfigError, match="fc: unknown axis 'diagonal'; expected one of row, column, entries"):
        Slice("diagonal", 0, 1).check((4, 6), "fc")


@given(
    st.lists(st.builds(Slice, st.sampled_from(["row", "column"]), st.integers(0, 12), st.integers(1, 9)), max_size=6)
)
def test_line_count_is_the_number_of_lines_touched(slices):
    for axis in ("row", "column"):
        assert line_count(slices, axis) == len(touched(slices, axis))


def test_lines_inside_a_wider_slice_count_once():
    assert line_count([Slice("row", 0, 9), Slice("row", 2, 3), Slice("row", 8, 2)], "row") == 10
