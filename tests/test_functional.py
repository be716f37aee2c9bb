"""Reading, writing and the gradient of one block, against a dense matrix that autograd differentiates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_helpers import Allocations, lines_of, slice_mask
from slicefine.errors import ContentError
from slicefine.functional import (
    guard_content,
    line_index,
    pad_block,
    read_block,
    slice_linear,
    track_slice,
    write_block,
)
from slicefine.geometry import Slice

OUT, IN = 7, 5
BLOCKS = [
    Slice("row", 0, 2),
    Slice("row", 5, 2),
    Slice("row", 0, OUT),
    Slice("column", 0, 1),
    Slice("column", 3, 2),
    Slice("column", 0, IN),
    Slice("entries", 11, 6),
    Slice("entries", 12, OUT * IN),
]
ONE_OF_EACH = [Slice("row", 2, 3), Slice("column", 1, 2), Slice("entries", 3, 9)]


def problem(dtype: torch.dtype = torch.float64, leading: tuple[int, ...] = (4,)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(*leading, IN), draw(OUT, IN), draw(OUT)


def parameter_of(weight: Tensor, block: Slice) -> Tensor:
    return read_block(weight, block).requires_grad_()


# -- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_read_and_write(block, transposed):
    weight = torch.randn(IN, OUT).t() if transposed else torch.randn(OUT, IN)  # a Conv1D's weight is a transposed view
    before = weight.clone()
    values = read_block(weight, block)
    assert torch.equal(values, lines_of(before, block))
    assert values.is_contiguous()
    values.zero_()  # a copy: the weight does not change
    assert torch.equal(weight, before)
    index = line_index(block, (OUT, IN)) if block.axis == "entries" else None
    write_block(weight, block, torch.full_like(values, 7.0, dtype=torch.float64), index)
    mask = slice_mask(block, (OUT, IN))
    assert torch.equal(weight, torch.where(mask, 7.0, before))


def test_pad_block_adds_zeros_after_the_lines():
    padded = pad_block(torch.ones(2, 3), (4, 5))
    assert padded.sum() == 6
    assert torch.equal(padded[:2, :3], torch.ones(2, 3))
    values = torch.ones(2, 3)
    assert pad_block(values, (2, 3)) is values


# -- gradients --------------------------------------------------------------------------------------------------------


def dense_gradients(x: Tensor, weight: Tensor, bias: Tensor, block: Slice, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the block and of the input from plain autograd."""
    x, dense = x.clone().requires_grad_(), weight.clone().requires_grad_()
    F.linear(x, dense, bias).backward(upstream)
    return lines_of(dense.grad, block), x.grad


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_gradients_equal_dense_autograd(block, leading):
    x, weight, bias = problem(leading=leading)
    upstream = torch.randn(*leading, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected, expected_x = dense_gradients(x, weight, bias, block, upstream)
    x.requires_grad_()
    parameter = parameter_of(weight, block)
    y = slice_linear(x, weight, bias, parameter, block)
    assert torch.equal(y, F.linear(x, weight, bias))
    y.backward(upstream)
    assert_close(parameter.grad, expected)
    assert_close(x.grad, expected_x)


@pytest.mark.parametrize("block", ONE_OF_EACH, ids=str)
def test_gradcheck(block):
    x, weight, bias = problem()
    parameter = parameter_of(weight, block)

    def f(x: Tensor, parameter: Tensor) -> Tensor:
        dense = weight.clone()
        write_block(dense, block, parameter.detach())
        return slice_linear(x, dense, bias, parameter, block)

    assert torch.autograd.gradcheck(f, (x.requires_grad_(), parameter))


@pytest.mark.parametrize("block", ONE_OF_EACH, ids=str)
def test_input_without_gradient_and_non_contiguous_upstream(block):
    x, weight, bias = problem(leading=(3, 2))
    expected, _ = dense_gradients(x, weight, bias, block, torch.ones(3, 2, OUT, dtype=torch.float64))
    parameter = parameter_of(weight, block)
    slice_linear(x, weight, bias, parameter, block).sum().backward()  # the upstream gradient is an expanded scalar
    assert_close(parameter.grad, expected)
    assert x.grad is None


def test_padded_parameter_gets_zero_gradient_in_its_padding():
    x, weight, _ = problem()
    block = Slice("column", 1, 2)
    parameter = pad_block(read_block(weight, block), (4, 9)).requires_grad_()
    slice_linear(x, weight, None, parameter, block).square().sum().backward()
    assert parameter.grad.shape == (4, 9)
    assert parameter.grad[:2, :OUT].abs().min() > 0
    assert parameter.grad[2:].abs().sum() == 0
    assert parameter.grad[:, OUT:].abs().sum() == 0


@pytest.mark.parametrize("block", ONE_OF_EACH, ids=str)
def test_in_place_activation_after_the_layer(block):
    x, weight, bias = problem()
    dense = weight.clone().requires_grad_()
    F.linear(x, dense, bias).relu().square().sum().backward()
    parameter = parameter_of(weight, block)
    y = slice_linear(x, weight, bias, parameter, block)
    y.add_(0.5).sub_(0.5)
    y = F.relu(y, inplace=True)
    y.square().sum().backward()
    assert_close(parameter.grad, lines_of(dense.grad, block))


@pytest.mark.parametrize("block", ONE_OF_EACH, ids=str)
def test_input_changed_in_place_before_backward_is_noticed_or_harmless(block):
    x, weight, bias = problem()
    expected, _ = dense_gradients(x, weight, bias, block, torch.ones(4, OUT, dtype=torch.float64))
    parameter = parameter_of(weight, block)
    x = x.clone()
    y = slice_linear(x, weight, bias, parameter, block)
    x.zero_()
    if block.axis == "column":  # a copy of its columns was kept
        y.sum().backward()
        assert_close(parameter.grad, expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("block", ONE_OF_EACH, ids=str)
def test_one_layer_used_twice_in_a_forward(block):
    x, weight, _ = problem()
    weight = weight[:IN].contiguous()  # square, so that it can follow itself
    block = block if block.axis != "entries" else Slice("entries", 3, 9)
    dense = weight.clone().requires_grad_()
    F.linear(F.linear(x, dense).tanh(), dense).square().sum().backward()
    parameter = parameter_of(weight, block)
    hidden = slice_linear(x, weight, None, parameter, block).tanh()
    slice_linear(hidden, weight, None, parameter, block).square().sum().backward()
    assert_close(parameter.grad, lines_of(dense.grad, block))


@pytest.mark.parametrize("block", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_plain(block, mode):
    x, weight, bias = problem()
    parameter = parameter_of(weight, block)
    with mode():
        y = slice_linear(x, weight, bias, parameter, block)
    assert not y.requires_grad
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("block", ONE_OF_EACH, ids=str)
def test_autocast_to_bfloat16(block):
    x, weight, bias = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        dense = weight.clone().requires_grad_()
        F.linear(x, dense, bias).sum().backward()
        parameter = parameter_of(weight, block)
        y = slice_linear(x, weight, bias, parameter, block)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert parameter.grad.dtype == torch.float32
    assert_close(parameter.grad, lines_of(dense.grad, block), rtol=1.6e-2, atol=1e-5)  # bfloat16's own tolerance


@pytest.mark.parametrize("block", ONE_OF_EACH, ids=str)
def test_half_precision_weight_with_fp32_parameter(block):
    x, weight, bias = problem(torch.bfloat16)
    parameter = read_block(weight, block).float().requires_grad_()
    dense = weight.clone().requires_grad_()
    F.linear(x, dense, bias).sum().backward()
    slice_linear(x, weight, bias, parameter, block).sum().backward()
    assert parameter.grad.dtype == torch.float32
    assert_close(parameter.grad, lines_of(dense.grad, block).float(), rtol=1.6e-2, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("block", ONE_OF_EACH, ids=str)
def test_gradient_checkpointing(block, reentrant):
    x, weight, bias = problem()
    expected, expected_x = dense_gradients(x, weight, bias, block, torch.ones(4, OUT, dtype=torch.float64))
    parameter = parameter_of(weight, block)
    x.requires_grad_()
    checkpoint(lambda x: slice_linear(x, weight, bias, parameter, block), x, use_reentrant=reentrant).sum().backward()
    assert_close(parameter.grad, expected)
    assert_close(x.grad, expected_x)


def test_a_second_derivative_is_refused():
    x, weight, bias = problem()
    block = Slice("row", 2, 3)
    x.requires_grad_()
    y = slice_linear(x, weight, bias, parameter_of(weight, block), block)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


# -- memory -----------------------------------------------------------------------------------------------------------


def largest_temporary(block: Slice, out: int = 64, features: int = 48) -> int:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, features, generator=generator)
    x = torch.randn(3, features, generator=generator).requires_grad_()
    parameter = read_block(weight, block).requires_grad_()
    with Allocations() as allocations:
        slice_linear(x, weight, None, parameter, block).square().sum().backward()
    assert parameter.grad is not None
    return allocations.largest


def test_rows_and_columns_allocate_nothing_of_the_weights_size():
    # The largest tensors are the outputs, 3 x 64, or the block itself; a dense gradient would be 64 x 48.
    assert largest_temporary(Slice("row", 10, 2)) <= 3 * 64
    assert largest_temporary(Slice("column", 10, 2)) <= 3 * 64
    assert largest_temporary(Slice("entries", 10, 20)) == 64 * 48  # Appendix K's mask may form one dense gradient


def saved_by_forward(block: Slice) -> list[tuple[int, ...]]:
    x, weight, bias = problem(leading=(2, 3))
    parameter = parameter_of(weight, block)
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        slice_linear(x, weight, bias, parameter, block)
    return sorted(s for s in shapes if s not in {(OUT, IN), (IN, OUT)})  # the weight is saved for the input gradient


def test_a_column_slice_keeps_only_its_columns_of_the_input():
    assert saved_by_forward(Slice("column", 1, 2)) == [(2,), (2, 3, 2)]
    assert saved_by_forward(Slice("row", 2, 3)) == [(2, 3, IN), (3,)]


# -- content ----------------------------------------------------------------------------------------------------------


class Owner:
    label = "fc"

    def __init__(self) -> None:
        self.content = 1


@pytest.mark.parametrize("tracked", [True, False])
def test_backward_over_other_content_raises(tracked):
    x, weight, _ = problem()
    x.requires_grad_()
    owner, block = Owner(), Slice("row", 0, 2)

    def forward() -> Tensor:
        if tracked:
            return slice_linear(x, weight, None, parameter_of(weight, block), block, owner)
        return guard_content(F.linear(x, weight), owner)

    forward().sum().backward()
    y = forward()
    owner.content = 2
    with pytest.raises(ContentError, match="fc: the weights changed between forward and backward"):
        y.sum().backward()
    y = forward()
    owner.content = 3
    owner.content = 2  # another content in between does no harm
    y.sum().backward()


def test_track_slice_follows_any_dense_layer():
    layer = nn.Linear(IN, OUT, dtype=torch.float64)
    x, _, _ = problem()
    block = Slice("row", 1, 2)
    parameter = parameter_of(layer.weight.detach(), block)
    index = line_index(block, (OUT, IN))
    track_slice(layer(x), x, parameter, index, "row", None).square().sum().backward()
    assert_close(parameter.grad, layer.weight.grad[1:3])  # the dense weight is trained here as well
