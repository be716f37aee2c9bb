"""Layers that are no plain linear ones (packed attention, embeddings, convolutions, experts) against a twin."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from slicefine import ConfigError, Slice, UnsupportedError, attach
from slicefine.errors import ContentError
from slicefine.layer import SliceLayer
from slicefine.tuner import SliceTuner
from slicefine.weights import kind_of, matrix_of


class Experts(nn.Module):
    """Experts as transformers keeps them: one tensor for all of them."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (3, 4, 6), (3, 6, 4)
        self.up_proj = nn.Parameter(torch.randn(up if is_transposed else down))
        self.down_proj = nn.Parameter(torch.randn(down if is_transposed else up))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., 4)`` through every expert, summed."""
        turn = (lambda w: w.transpose(1, 2)) if self.is_transposed else (lambda w: w)
        hidden = torch.einsum("...i,eoi->...eo", x, turn(self.up_proj)).tanh()
        return torch.einsum("...eo,eio->...i", hidden, turn(self.down_proj))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Scaled(nn.Embedding):
    """An embedding whose output is no plain line of its table."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * 3


TOKENS = torch.tensor([[1, 4, 4], [0, 9, 2]])
FIRST = {"target_modules": ["0"]}
CASES = {
    "packed": (Attention, (2, 3, 8), {"target_modules": ["attention"]}, ["attention.in_proj_weight"]),
    "hidden": (Attention, (2, 3, 8), {"target_modules": ["out_proj"]}, ["attention.out_proj.weight"]),
    "both": (Attention, (2, 3, 8), {}, ["attention.in_proj_weight", "attention.out_proj.weight"]),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3)), (2, 4, 5, 5), FIRST, ["0.weight"]),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(8, 6, 3, groups=2)),
        (2, 8, 5),
        {"target_modules": ["0"]},
        ["0.weight"],
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(10, 6)), TOKENS, FIRST, ["0.weight"]),
    "padded": (
        lambda: nn.Sequential(nn.Embedding(10, 6, padding_idx=4)),
        TOKENS,
        {"target_modules": ["0"]},
        ["0.weight"],
    ),
    "scaled": (lambda: nn.Sequential(Scaled(10, 6)), TOKENS, FIRST, ["0.weight"]),
    "experts": (
        lambda: nn.Sequential(Experts()),
        (2, 3, 4),
        {"target_modules": [], "target_parameters": ["up_proj", "down_proj"]},
        ["0.up_proj", "0.down_proj"],
    ),
    "transposed experts": (
        lambda: nn.Sequential(Experts(True)),
        (2, 3, 4),
        {"target_modules": [], "target_parameters": ["up_proj", "down_proj"]},
        ["0.up_proj", "0.down_proj"],
    ),
}
STACKED = {"experts", "transposed experts"}


def make(case: str) -> tuple[nn.Module, torch.Tensor, dict, list[str]]:
    torch.manual_seed(3)
    build, x, options, names = CASES[case]
    return build(), x if isinstance(x, torch.Tensor) else torch.randn(x), options, names


def mask_of(name: str, module: nn.Module, block: Slice) -> torch.Tensor:
    """Which entries of a weight a slice covers, spelled out by hand for each kind of layer."""
    weight = module.get_parameter(name)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    lines = slice(block.start, block.start + block.width)
    if isinstance(module[0] if isinstance(module, nn.Sequential) else module, Experts):
        count = weight.shape[0]
        axis = (2 if block.axis == "row" else 1) if module[0].is_transposed else (1 if block.axis == "row" else 2)
        chosen = lines if block.axis == "row" else slice(block.start // count, (block.start + block.width) // count)
        mask[(slice(None),) * axis + (chosen,)] = True
    elif block.axis == "row":
        mask[lines] = True
    elif weight.dim() > 2:
        kernel = weight[0, 0].numel()
        mask[:, block.start // kernel : (block.start + block.width) // kernel] = True
    else:
        mask[:, lines] = True
    return mask


class Twin:
    """The same training, slowly: the whole gradient of every weight, masked, with an optimizer of its own per visit."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model = model.requires_grad_(False)
        self.weights = {name: model.get_parameter(name) for name in names}

    def visit(self, blocks: dict[str, Slice], x: torch.Tensor, steps: int) -> None:
        masks = {name: mask_of(name, self.model, block) for name, block in blocks.items()}
        optimizer = torch.optim.Adam(self.weights.values(), lr=0.05)
        for _ in range(steps):
            for weight in self.weights.values():
                weight.requires_grad_(True)
                weight.grad = None
            loss_of(self.model(x)).backward()
            for name, weight in self.weights.items():
                weight.requires_grad_(False)
                weight.grad.masked_fill_(~masks[name], 0)
            optimizer.step()


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return (y - 1).square().mean()


def weight_names(tuner: SliceTuner, names: list[str]) -> dict[str, str]:
    """Names of weights by the names of their layers."""
    return {layer: next(n for n in names if n == layer or n.rpartition(".")[0] == layer) for layer in tuner.layers}


@pytest.mark.parametrize("mode", ["row", "column", "alternate"])
@pytest.mark.parametrize("case", CASES)
def test_slices_train_as_the_twin_does_over_moves(case, mode):
    model, x, options, names = make(case)
    twin = Twin(copy.deepcopy(model), names)
    before = copy.deepcopy(model.state_dict())
    tuner = attach(model, r=2, mode=mode, interval=3, **options)
    by_layer = weight_names(tuner, names)
    optimizer = torch.optim.Adam(tuner.parameters(), lr=0.05)
    seen = set()
    for _ in range(4):
        blocks = {by_layer[layer]: block for layer, block in tuner.mover.slices().items()}
        seen |= set(blocks.items())
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
        twin.visit(blocks, x, 3)
    assert tuner.mover.visits == 5
    assert len(seen) > len(names)  # they moved
    assert_close(model(x), twin.model(x))
    with tuner.disabled():
        assert_close(model(x), functional_call(twin.model, before, (x,)), rtol=0, atol=0)
    tuner.unload(merge=True)
    assert not any(isinstance(module, SliceLayer) for module in model.modules())
    for name, weight in twin.weights.items():
        assert not torch.equal(weight, before[name])
        assert_close(model.get_parameter(name), weight)


@pytest.mark.parametrize("case", sorted(CASES.keys() - STACKED))
def test_a_random_mask_trains_its_entries_only(case):
    model, x, options, names = make(case)
    before = copy.deepcopy(model.state_dict())
    tuner = attach(model, mode="random_mask", mask_fraction=0.2, interval=100, **options)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    loss_of(model(x)).backward()
    optimizer.step()
    tuner.unload(merge=True)
    dense = copy.deepcopy(model)
    dense.load_state_dict(before)
    dense.requires_grad_(True)
    loss_of(dense(x)).backward()
    for name in names:
        changed = model.get_parameter(name) != before[name]
        assert 0 < changed.sum() <= 0.25 * changed.numel()
        expected = before[name] - 0.1 * dense.get_parameter(name).grad
        assert_close(model.get_parameter(name)[changed], expected[changed])


@pytest.mark.parametrize("case", CASES)
def test_a_file_brings_everything_back(case, tmp_path):
    model, x, options, _ = make(case)
    base = copy.deepcopy(model)
    tuner = attach(model, r=1, mode="alternate", interval=1, **options)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for _ in range(3):
        loss_of(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tuner.save(tmp_path / "slices.safetensors")
    other = attach(base, r=1, mode="alternate", interval=1, **options)
    other.load(tmp_path / "slices.safetensors")
    assert_close(base(x), model(x), rtol=0, atol=0)
    tuner.undo(2)
    other.undo(2)
    assert_close(base(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_backward_over_other_weights_is_refused(case):
    model, x, options, _ = make(case)
    tuner = attach(model, r=1, mode="row", interval=1, **options)
    loss = loss_of(model(x))
    tuner.move()
    with pytest.raises(ContentError, match="the weights changed between forward and backward"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's compiler does it
@pytest.mark.parametrize("case", ["packed", "both", "convolution", "embedding", "experts"])
def test_compiled_layers_train_alike_and_do_not_recompile(case):
    torch._dynamo.reset()
    losses = {}
    for compiled in (False, True):
        model, x, options, _ = make(case)
        tuner = attach(model, r=1, mode="row", interval=2, **options)
        call = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        losses[compiled] = []
        for step in range(6):
            with torch._dynamo.config.patch(error_on_recompile=compiled and step > 0):
                loss = loss_of(call(x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[compiled].append(loss.item())
    assert losses[True] == pytest.approx(losses[False])


def test_kinds_are_told_apart():
    assert kind_of(nn.LayerNorm(4)) is None
    assert kind_of(nn.ConvTranspose2d(4, 4, 2)) is None
    assert kind_of(nn.Embedding(4, 4, max_norm=1.0)) is None
    assert kind_of(nn.MultiheadAttention(4, 2, kdim=3, vdim=5)) is None  # three weights, none of them packed
    assert kind_of(nn.Linear(4, 4), "bias") is None
    assert kind_of(Experts(), "up_proj").unit == 3
    assert kind_of(Experts(True), "up_proj").layout == "stack transposed"
    assert matrix_of(nn.Linear(3, 4)).shape == (4, 3)


def test_ranks_and_starts_of_columns_count_input_features():
    model = nn.Sequential(nn.Conv2d(5, 4, 3))
    tuner = attach(model, target_modules=["0"], r=2, mode="column", positions=[3, 1], interval=1)
    assert tuner.layers["0"].states["default"].journal.active == Slice("column", 27, 18)
    with pytest.raises(ConfigError, match="9 columns of its weight belong to one input feature"):
        tuner.mover.move({"0": Slice("column", 5, 18)})


def test_what_cannot_be_trained_says_so():
    experts = nn.Sequential(Experts())
    with pytest.raises(UnsupportedError, match="draws entries of one matrix, and these are the weights of several"):
        attach(experts, target_modules=[], target_parameters=["up_proj"], mode="random_mask")
    with pytest.raises(ConfigError, match="'side_proj' matches no parameter"):
        attach(experts, target_modules=[], target_parameters=["side_proj"])
    with pytest.raises(ConfigError, match="0.bias is no floating-point weight of 2 or 3 dimensions"):
        attach(nn.Sequential(nn.Linear(2, 2)), target_modules=[], target_parameters=["bias"])
    with pytest.raises(ConfigError, match="0.weight is trained by target_modules already"):
        attach(nn.Sequential(nn.Linear(2, 2)), target_parameters=["0.weight"])
    with pytest.raises(ConfigError, match=r"matches no layer that can be trained \(linear"):
        attach(nn.Sequential(nn.Embedding(4, 4)))
    with pytest.raises(UnsupportedError, match="of linear layers beside it"):
        attach(nn.Sequential(nn.Conv2d(2, 2, 1)), target_modules=["0"], additive=True)


def test_layers_of_several_adapters_refuse_to_train_and_add_up():
    torch.manual_seed(1)
    layer = SliceLayer(nn.Conv2d(2, 3, 2))
    from slicefine.schedule import Schedule

    for name in ("a", "b"):
        layer.add_slice(name, Schedule("row", row_rank=1), name)
        with torch.no_grad():
            layer.slicefine_active[name].add_(1)
    original = layer.base_layer.weight.clone()
    layer.apply_only(["a", "b"])
    x = torch.randn(1, 2, 3, 3)
    assert_close(layer.base_layer.weight[0], original[0] + 2)
    with pytest.raises(UnsupportedError, match="several SliceFine adapters are active"):
        F.relu(layer(x)).sum().backward()
    layer.apply_only([])
    assert torch.equal(layer.base_layer.weight, original)


@pytest.mark.parametrize("after", [False, True])
def test_channels_last_convolutions_train(after):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    if not after:
        model.to(memory_format=torch.channels_last)
    tuner = attach(model, target_modules=["0"], r=2, mode="alternate", interval=2)
    if after:
        model.to(memory_format=torch.channels_last)
    twin = Twin(copy.deepcopy(nn.Sequential(tuner.layers["0"].base_layer)), ["0.weight"])
    optimizer = torch.optim.Adam(tuner.parameters(), lr=0.05)
    x = torch.randn(2, 4, 5, 5)
    for _ in range(3):
        blocks = {f"{name}.weight": block for name, block in tuner.mover.slices().items()}
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
        twin.visit(blocks, x, 2)
    assert_close(model(x), twin.model(x))
    assert not model[0].base_layer.weight.is_contiguous()


def test_an_output_projection_shows_what_was_written_without_gradients_too():
    model = Attention()
    tuner = attach(model, target_modules=["out_proj"], r=2, mode="row", interval=9)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        tuner.parameters()[0].add_(1)
        written = model(x)
    assert_close(written, model(x).detach())


def test_fused_inference_sees_additive_slices():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    tuner = attach(model, target_modules=["linear1", "linear2"], r=2, mode="row", interval=9, additive=True)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(1)
    x = torch.randn(2, 3, 8)
    slow = model(x).detach()
    with torch.no_grad():
        assert_close(model.eval()(x), slow)


def test_an_attach_that_fails_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    positions = {"1": {"row": [7]}}
    with pytest.raises(ConfigError, match="row slice of width 1 at 7 does not fit"):
        attach(model, r=1, mode="row", positions=positions, start_values="zero", interval=1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_embeddings_that_renormalise_are_refused_as_parameters_too():
    with pytest.raises(ConfigError, match="0.weight is no floating-point weight"):
        attach(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), target_modules=[], target_parameters=["0.weight"])
