"""DeepSpeed's ZeRO: stages 1, 2 and 3 give the run of one process, what does not is refused by name.

The tests with real processes need DeepSpeed, which the development lock leaves out; those with a stand-in do not.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from types import MethodType, ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import distributed_jobs as jobs
import zero_jobs as zero
from core_helpers import mlp
from peft_helpers import THIRD_PARTY, llama
from slicefine import SliceFineConfig, attach
from slicefine.errors import NumericalError, OptimizerError, UnsupportedError
from slicefine.functional import read_block, write_block
from slicefine.geometry import Slice
from slicefine.sharded import ShardedMatrix
from slicefine.sharded import whole as gathered_whole
from slicefine.zero import ZeroOptimizer

pytestmark = THIRD_PARTY
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)"
)

JOBS = [zero.zero2_variants, zero.zero2, zero.zero2_resumed, zero.zero1, zero.zero2_bf16, zero.zero2_skips]
JOBS += [zero.zero2_offload, zero.zero2_head, zero.zero2_accelerate, zero.zero_refused]
JOBS_3 = [zero.zero3, zero.zero3_resumed, zero.zero3_variants, zero.zero3_settings, zero.zero3_bf16, zero.zero3_loaded]
JOBS_3 += [zero.zero3_accelerate, zero.zero3_between, zero.zero3_skips, zero.zero3_refused]


# -- real processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def found(folder):
    """What two processes found, job by job."""
    return jobs.launch(JOBS, folder)


@pytest.fixture(scope="module")
def spread(folder):
    """The same at stage 3."""
    return jobs.launch(JOBS_3, folder)


@pytest.fixture(scope="module")
def alone(folder):
    """One process on the whole batch, in every mode."""
    return {mode: zero.run(folder / f"one-{mode}", 1, mode) for mode in zero.MODES}


def of(found, job):
    """Both ranks' results of one job; a failed one shows its traceback."""
    for rank, result in enumerate(found[job]):
        assert "failed" not in result, f"rank {rank}:\n{result['failed']}"
    return found[job]


def same_run(one, other, **tolerance):
    """The same visits on every layer; weights, parameters and originals alike; the losses, too."""
    assert one["visits"].keys() == other["visits"].keys()
    for name, table in one["visits"].items():
        assert torch.equal(table, other["visits"][name])
    for kind in ("weights", "active", "originals"):
        for name, mine in one[kind].items():
            its = other[kind][name]
            assert_close(mine.float(), its.float(), **(tolerance or {"atol": 2e-6, "rtol": 1e-5}))


def same_file(one, other, **tolerance):
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        if tensor.is_floating_point():
            assert_close(tensor.float(), other[key].float(), **(tolerance or {"atol": 2e-6, "rtol": 1e-5}))
        else:
            assert torch.equal(tensor, other[key])
    return one


@needs_deepspeed
@pytest.mark.parametrize("mode", zero.MODES)
def test_stage_2_gives_the_run_of_one_process(mode, found, alone):
    for result in of(found, "zero2"):
        assert {len(table) for table in result[mode]["visits"].values()} == {5}  # four moves
        same_run(result[mode], alone[mode])
        assert_close(result[mode]["losses"], alone[mode]["losses"], atol=1e-4, rtol=0)


@needs_deepspeed
@pytest.mark.parametrize("mode", zero.MODES)
def test_parameter_master_weight_and_moments_agree_after_each_step(mode, found):
    for result in of(found, "zero2"):
        assert result[mode]["odd"] == []


@needs_deepspeed
@pytest.mark.parametrize("mode", zero.MODES)
def test_ranks_hold_the_same_bits(mode, found):
    first, second = of(found, "zero2")
    for kind in ("weights", "active", "originals"):
        for name, mine in first[mode][kind].items():
            assert torch.equal(mine, second[mode][kind][name])


@needs_deepspeed
@pytest.mark.parametrize("mode", zero.MODES)
def test_the_adapter_is_that_of_one_process(mode, found, alone, folder):
    of(found, "zero2")
    for end in ("end", f"checkpoint-{zero.SAVED}"):
        kept = same_file(folder / f"zero2-{mode}" / end, folder / f"one-{mode}" / end)
        assert all("slicefine_" in key for key in kept)  # no weights


@needs_deepspeed
def test_stage_1_gives_the_run_of_one_process(found, alone):
    for result in of(found, "zero1"):
        same_run(result, alone["alternate"])


@needs_deepspeed
def test_a_checkpoint_goes_on_as_if_nothing_had_been(found):
    for result, whole in zip(of(found, "zero2_resumed"), of(found, "zero2"), strict=True):
        same_run(result, whole["alternate"], atol=0, rtol=0)
        assert result["losses"] == whole["alternate"]["losses"]


@needs_deepspeed
@pytest.mark.parametrize("name", zero.VARIANTS)
def test_what_touches_parameters_beside_the_step(name, found, folder):
    alone = zero.run(folder / f"one-{name}", 1, "alternate", slices=zero.VARIANTS[name])
    for result in of(found, "zero2_variants"):
        same_run(result[name], alone)


@needs_deepspeed
@pytest.mark.parametrize(("name", "tolerance"), [("sgd", 1e-2), ("adamw", 1e-1)])
def test_bfloat16_under_fp32_masters(name, tolerance, found, folder):
    """Gradients are rounded to bfloat16, and AdamW makes a whole step of the smallest."""
    settings = zero.SGD if name == "sgd" else {}
    alone = zero.run(folder / f"one-bf16-{name}", 1, "alternate", model=llama().bfloat16(), **settings)
    for result in of(found, "zero2_bf16"):
        same_run(result[name], alone, atol=tolerance, rtol=0)
        assert_close(result[name]["losses"], alone["losses"], atol=1e-2, rtol=0)


@needs_deepspeed
def test_bfloat16_keeps_masters_exact(found):
    for result in of(found, "zero2_bf16"):
        assert result["adamw"]["odd"] == []
        assert result["adamw"]["apart"] > 0  # masters hold more than their parameters
        same_run(result["resumed"], result["adamw"], atol=0, rtol=0)


@needs_deepspeed
def test_steps_that_are_left_out_do_not_count(found, folder):
    settings = {"slices": {"on_nonfinite": "skip"}, "lr_scheduler_type": "constant"}
    with pytest.warns(UserWarning, match="a step after step 2 had NaN or infinite gradients"):
        alone = zero.run(folder / "one-skips", 1, "alternate", spoil=4, **settings)
    assert alone["skipped"] == 1
    for result in of(found, "zero2_skips"):
        assert result["skipped"] == 1
        same_run(result, alone)
        assert "20 steps in a row had NaN or infinite gradients" in result["lost"]


@needs_deepspeed
def test_a_head_in_a_group_of_its_own(found, folder):
    alone = zero.run(folder / "one-head", 1, "alternate", own_groups=True, **zero.HEAD)
    for result in of(found, "zero2_head"):
        same_run(result, alone)
    same_file(folder / "zero2-head" / "end", folder / "one-head" / "end")


@needs_deepspeed
def test_masters_in_the_memory_of_the_cpu(found, alone):
    for result in of(found, "zero2_offload"):
        assert result["odd"] == []
        same_run(result["whole"], alone["alternate"])
        same_run(result["again"], result["whole"], atol=0, rtol=0)


@needs_deepspeed
def test_a_loop_with_accelerate(found):
    from accelerate import Accelerator

    alone = zero.loop(Accelerator(cpu=True), 0, 1)
    for result in of(found, "zero2_accelerate"):
        same_run(result, alone)


@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "message"),
    {
        "window": r"window= .* Train all layers at once, or use FSDP2",
        "adafactor": "Adafactor under ZeRO.* Use AdamW, or FSDP2",
        "accumulation in fp32": "BF16_Optimizer.*leave data_types out",
        "head": "a group of AdamW holds 4 slices and 1 other parameters .* a group of their own",
    }.items(),
)
def test_what_stays_refused(name, message, found):
    for result in of(found, "zero_refused"):
        assert re.search(message, result.get(name, "it was not refused"))


# -- stage 3 ------------------------------------------------------------------------------------------------------


@needs_deepspeed
@pytest.mark.parametrize("mode", zero.MODES)
def test_stage_3_gives_the_run_of_one_process(mode, spread, alone):
    first, second = of(spread, "zero3")
    for result in (first, second):
        assert {len(table) for table in result[mode]["visits"].values()} == {5}  # four moves
        same_run(result[mode], alone[mode])
        assert_close(result[mode]["losses"], alone[mode]["losses"], atol=1e-4, rtol=0)
        assert result[mode]["odd"] == []
    same_run(first[mode], second[mode], atol=0, rtol=0)


@needs_deepspeed
@pytest.mark.parametrize("mode", zero.MODES)
def test_an_adapter_from_pieces_is_that_of_one_process(mode, spread, alone, folder):
    """`Trainer` lets DeepSpeed gather what there is of parameters and buffers; the journal is neither."""
    of(spread, "zero3")
    for end in ("end", f"checkpoint-{zero.SAVED}"):
        kept = same_file(folder / f"zero3-{mode}" / end, folder / f"one-{mode}" / end)
        assert all("slicefine_" in key for key in kept)  # no weights


@needs_deepspeed
@pytest.mark.parametrize("saved", [zero.SAVED - 1, zero.SAVED])
def test_a_checkpoint_in_pieces_goes_on_as_if_nothing_had_been(saved, spread):
    for result, whole in zip(of(spread, "zero3_resumed"), of(spread, "zero3"), strict=True):
        same_run(result[str(saved)], whole["alternate"], atol=0, rtol=0)
        assert result[str(saved)]["losses"] == whole["alternate"]["losses"]


@needs_deepspeed
@pytest.mark.parametrize("name", zero.VARIANTS)
def test_what_touches_spread_parameters_beside_the_step(name, spread, folder):
    alone = zero.run(folder / f"one-3-{name}", 1, "alternate", slices=zero.VARIANTS[name])
    for result in of(spread, "zero3_variants"):
        same_run(result[name], alone)


@needs_deepspeed
@pytest.mark.parametrize("name", zero.SETTINGS)
def test_settings_of_stage_3(name, spread, alone):
    for result in of(spread, "zero3_settings"):
        assert result[name]["odd"] == []
        same_run(result[name], alone["alternate"])


@needs_deepspeed
@pytest.mark.parametrize("name", zero.LAYERS)
def test_layers_whose_weights_are_spread(name, spread, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's about saved embeddings, and of torch's checkpointing
        alone = zero.run(folder / f"one-{name}", 1, "alternate", **zero.made(zero.LAYERS[name]))
    for result in of(spread, "zero3_settings"):
        same_run(result[name], alone)


@needs_deepspeed
@pytest.mark.parametrize(("name", "tolerance"), [("sgd", 1e-2), ("adamw", 1e-1), ("loaded", 1e-1)])
def test_bfloat16_in_pieces(name, tolerance, spread, folder):
    """A model that is loaded in pieces keeps its slices in fp32; else DeepSpeed casts them, too."""
    settings = zero.SGD if name == "sgd" else {}
    alone = zero.run(folder / f"one-bf16-3-{name}", 1, "alternate", model=llama().bfloat16(), **settings)
    for result in of(spread, "zero3_bf16"):
        same_run(result[name], alone, atol=tolerance, rtol=0)
        assert_close(result[name]["losses"], alone["losses"], atol=1e-2, rtol=0)
        kept = {tensor.dtype for tensor in result[name]["active"].values()}
        assert kept == {torch.float32 if name == "loaded" else torch.bfloat16}


@needs_deepspeed
def test_bfloat16_in_pieces_keeps_masters_exact(spread):
    for result in of(spread, "zero3_bf16"):
        assert result["adamw"]["odd"] == result["loaded"]["odd"] == []
        assert result["adamw"]["apart"] > 0  # masters hold more than their parameters
        same_run(result["resumed"], result["adamw"], atol=0, rtol=0)
        assert result["resumed"]["losses"] == result["adamw"]["losses"]


@needs_deepspeed
def test_a_model_that_was_loaded_in_pieces(spread, alone):
    for result in of(spread, "zero3_loaded"):
        same_run(result["loaded"], alone["alternate"])
        same_run(result["again"], result["loaded"], atol=0, rtol=0)
        same_run(result["from the adapter"], result["loaded"], atol=0, rtol=0)


@needs_deepspeed
def test_a_loop_with_accelerate_and_its_checkpoint_of_all_weights(spread):
    from accelerate import Accelerator

    alone = zero.loop(Accelerator(cpu=True), 0, 1)
    for result in of(spread, "zero3_accelerate"):
        same_run(result["whole"], alone)
        same_run(result["again"], result["whole"], atol=0, rtol=0)
    gathered, nothing = (result["whole"]["state"] for result in of(spread, "zero3_accelerate"))
    assert nothing is None  # the first process alone gets it
    model = get_peft_model(llama(), SliceFineConfig(r=2, mode="alternate", interval=2, target_modules="all-linear"))
    model.load_state_dict(gathered)
    same_run(zero.facts(model), result["whole"], atol=0, rtol=0)


@needs_deepspeed
def test_what_is_done_between_steps(spread, folder):
    """Differences, files, switching off, writing into slices, restarting and undoing."""
    callback = zero.Between(folder / "one-between" / "own")
    zero.run(folder / "one-between", 1, "alternate", callbacks=[callback])
    for result in of(spread, "zero3_between"):
        same_run(result.pop("undone"), callback.found["undone"])
        for name, tensor in result.items():
            assert_close(tensor, callback.found[name], atol=1e-5, rtol=1e-5)
    same_file(folder / "zero3-between" / "own", folder / "one-between" / "own")


@needs_deepspeed
def test_steps_that_are_left_out_at_stage_3(spread, folder):
    settings = {"slices": {"on_nonfinite": "skip"}, "lr_scheduler_type": "constant"}
    with pytest.warns(UserWarning, match="a step after step 2 had NaN or infinite gradients"):
        alone = zero.run(folder / "one-skips-3", 1, "alternate", spoil=4, **settings)
    for result in of(spread, "zero3_skips"):
        assert result["skipped"] == 1
        same_run(result, alone)


@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "message"),
    {
        "window": r"window= .* Train all layers at once, or use FSDP2",
        "adafactor": "Adafactor under ZeRO.* Use AdamW, or FSDP2",
        "head": "a group of AdamW holds 4 slices and 1 other parameters .* a group of their own",
        "late slices": r"Make the slices first .* or DeepSpeed's engine",
        "late file": "Load an adapter before the model is handed to Trainer",
    }.items(),
)
def test_what_stage_3_refuses(name, message, spread):
    for result in of(spread, "zero3_refused"):
        assert re.search(message, result.get(name, "it was not refused"))


# -- a stand-in ---------------------------------------------------------------------------------------------------


class StandIn:
    """As DeepSpeed's optimizer for one process: flat fp32 masters, which a step copies over the parameters."""

    def __init__(self, parameters):
        self.bit16_groups = [list(parameters)]
        self.overflow = False
        flat = torch.cat([p.detach().float().reshape(-1) for p in parameters]).requires_grad_()
        self.single_partition_of_fp32_groups = [flat]
        self.optimizer = torch.optim.AdamW([flat], lr=0.05)
        self._hp_optimizer_states_linked = True
        start = 0
        for p in parameters:
            place = SimpleNamespace(start=0, numel=p.numel())
            kept = flat.detach()[start : start + p.numel()]
            p._hp_mapping = SimpleNamespace(lp_fragment_address=place, get_hp_fragment=lambda kept=kept: kept)
            p.get_full_hp_param = MethodType(lambda self: self._hp_mapping.get_hp_fragment().view_as(self).clone(), p)
            start += p.numel()

    def step(self):
        (group,), (flat,) = self.bit16_groups, self.single_partition_of_fp32_groups
        gradients = [p.grad for p in group]
        for p in group:
            p.grad = None
        self.overflow = not all(bool(g.isfinite().all()) for g in gradients)
        if self.overflow:
            return
        flat.grad = torch.cat([g.float().reshape(-1) for g in gradients])
        self.optimizer.step()
        for p, values in zip(group, torch.split(flat.detach(), [p.numel() for p in group]), strict=True):
            p.data.copy_(values.view_as(p))


class Foreign:
    """An optimizer that is not PyTorch's."""

    param_groups: ClassVar = [{"params": [], "lr": 0.1}]


@pytest.fixture
def engine(monkeypatch):
    """The stand-in where DeepSpeed's optimizer would be."""
    module = ModuleType("deepspeed.runtime.zero.stage_1_and_2")
    module.DeepSpeedZeroOptimizer = type("DeepSpeedZeroOptimizer", (StandIn,), {"step": StandIn.step})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.DeepSpeedZeroOptimizer


def train(model, optimizer, steps=7, spoil=None):
    generator = torch.Generator().manual_seed(3)
    for number in range(steps):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)
        loss = (model(x) - y).square().mean()
        (loss * float("nan") if number == spoil else loss).backward()
        optimizer.step()
        for p in model.parameters():
            p.grad = None


def _spoiled(model, optimizer):
    for _ in range(30):
        train(model, optimizer, steps=1, spoil=0)


def tuned(dtype=torch.float32, **settings):
    model = mlp(dtype=dtype)
    return model, attach(model, **{"mode": "alternate", "r": 2, "interval": 2, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "row"},
        {"mode": "column"},
        {"state_policy": "rewarm", "rewarm_steps": 2},
        {"state_policy": "keep"},
        {"start_values": "zero"},
    ],
)
def test_the_stand_in_gives_the_plain_run(settings, engine):
    model, tuner = tuned(**settings)
    train(model, torch.optim.AdamW(tuner.parameters(), lr=0.05))
    other, its = tuned(**settings)
    train(other, engine(its.parameters()))
    assert its.mover.visits == tuner.mover.visits == 4
    for name, layer in tuner.layers.items():
        assert_close(its.layers[name].weight, layer.weight, atol=1e-6, rtol=1e-5)


def test_the_stand_in_leaves_a_step_out(engine):
    model, tuner = tuned()
    with pytest.warns(UserWarning, match="a step after step 1 had NaN or infinite gradients and was left out"):
        train(model, engine(tuner.parameters()), spoil=1)
    assert (tuner.mover.step, tuner.mover.visits, tuner.mover.skipped) == (6, 4, 1)
    model, tuner = tuned()
    optimizer = engine(tuner.parameters())
    with pytest.warns(UserWarning, match="left out"):
        train(model, optimizer, steps=1, spoil=0)
    with warnings.catch_warnings(), pytest.raises(NumericalError, match="20 steps in a row"):
        warnings.simplefilter("ignore")
        _spoiled(model, optimizer)


def test_steps_of_dynamic_loss_scaling_are_no_event(engine, recwarn):
    model, tuner = tuned()
    optimizer = engine(tuner.parameters())
    optimizer.dynamic_loss_scale = True
    for _ in range(25):
        train(model, optimizer, steps=1, spoil=0)
    assert (tuner.mover.step, tuner.mover.skipped) == (0, 0)
    assert not [w for w in recwarn if "left out" in str(w.message)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu_offload": True, "optimizer": Foreign()}, "Foreign under DeepSpeed's offload_optimizer"),
        ({"zenflow": True}, "zenflow"),
        ({"torch_autocast_gradscaler": 1}, "torch_autocast in float16"),
    ],
)
def test_settings_that_are_refused(change, message, engine):
    model, tuner = tuned()
    optimizer = engine(tuner.parameters())
    vars(optimizer).update(change)
    before = [layer.weight.detach().clone() for layer in tuner.layers.values()]
    with pytest.raises(UnsupportedError, match=message):
        train(model, optimizer)
    for weight, layer in zip(before, tuner.layers.values(), strict=True):
        assert torch.equal(weight, layer.weight)


def test_other_parameters_in_the_group_and_windows_are_refused(engine):
    model, tuner = tuned()
    head = nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedError, match="holds 3 slices and 1 other parameters"):
        train(model, engine([*tuner.parameters(), head]))
    model, tuner = tuned(window=1)
    with pytest.raises(UnsupportedError, match=r"window= does not work under DeepSpeed's ZeRO"):
        train(model, engine(tuner.parameters()))


def test_an_engine_of_another_model_is_no_concern(engine):
    model, tuner = tuned()
    optimizer = engine(tuner.parameters())
    train(model, optimizer, steps=1)
    other = nn.Linear(6, 5)
    stranger = engine(list(other.parameters()))
    stranger.zenflow = True
    train(other, stranger, steps=3)
    assert tuner.mover.step == 1


def test_a_step_that_nobody_watched_is_refused(engine):
    """As when only compiled forwards ran before it."""
    model, tuner = tuned()
    optimizer = StandIn(tuner.parameters())
    with pytest.raises(UnsupportedError, match="stepped before SliceFine saw a forward that was not compiled"):
        train(model, optimizer)


def test_bfloat16_masters_keep_what_their_parameters_round(engine):
    _, tuner = tuned(torch.bfloat16)
    for layer in tuner.layers.values():
        layer.cast_active("default", torch.bfloat16)
    optimizer = engine(tuner.parameters())
    parameter = tuner.parameters()[0]
    kept = parameter._hp_mapping.get_hp_fragment()
    kept += 1e-4 * kept.abs()
    before = kept.clone()
    (layer,) = [layer for layer in tuner.layers.values() if layer.parameter("default") is parameter]
    layer.take("default", layer.values("default"))  # as after a checkpoint was read
    assert torch.equal(kept, before)
    with torch.no_grad():
        parameter[0, 0] = 3.0
    layer.settle("default")
    assert kept[0] == 3.0
    assert torch.equal(kept[1:], before[1:])
    assert optimizer.overflow is False


@pytest.mark.parametrize("loaded", [True, False])
def test_flat_copies_without_marks_are_named_where_deepspeed_is_loaded(loaded, monkeypatch):
    """As at stage 0 in bf16: nothing on the parameters says that the optimizer holds copies."""
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    if loaded:
        monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    model, tuner = tuned()
    copies = torch.optim.SGD([nn.Parameter(p.detach().clone()) for p in tuner.parameters()], lr=0.1)
    with pytest.raises(OptimizerError) as caught:
        for _ in range(4):
            model(torch.randn(2, 6)).sum().backward()
            copies.step()
    assert ("use ZeRO stage 2, or fp32" in str(caught.value)) == loaded


def spread_parameter(values, rank=0, world=1, gathered=False):
    """A parameter as stage 3 leaves it in one of several processes: flat, padded pieces."""
    length = -(-values.numel() // world)
    padded = torch.cat([values.reshape(-1), torch.full((length * world - values.numel(),), -7.0, dtype=values.dtype)])
    parameter = nn.Parameter(values.clone() if gathered else values.new_empty(0), requires_grad=False)
    parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 0, values.shape, values.numel()
    parameter.ds_tensor = padded[rank * length : (rank + 1) * length].clone()
    parameter.ds_status = SimpleNamespace(name="AVAILABLE" if gathered else "NOT_AVAILABLE")
    parameter.ds_zero_partition_rank, parameter.ds_process_group = rank, None
    parameter.nvme_swapper = parameter.ds_zero_param_process_group = None
    return parameter


BLOCKS = [Slice("row", 1, 2), Slice("column", 2, 3), Slice("entries", 0, 6), Slice("row", 0, 5), Slice("column", 6, 1)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("world", [1, 3, 40])  # of 40 some hold nothing
def test_blocks_of_a_matrix_in_flat_pieces(block, transposed, world, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    matrix = torch.randn(5, 7)
    expected, new = read_block(matrix, block), torch.randn_like(read_block(matrix, block))
    stored = stored_of(matrix, transposed).contiguous()
    everyone = [spread_parameter(stored, rank, world) for rank in range(world)]
    matrices = [ShardedMatrix(parameter, transposed=transposed) for parameter in everyone]
    assert {found.shape for found in matrices} == {matrix.shape}
    assert torch.equal(sum(found.read(block) for found in matrices), expected)
    for found in matrices:
        found.write(block, new)
    write_block(matrix, block, new)
    pieces = torch.cat([parameter.ds_tensor for parameter in everyone])
    assert torch.equal(pieces[: matrix.numel()].view(stored.shape), stored_of(matrix, transposed))
    assert bool((pieces[matrix.numel() :] == -7.0).all())  # padding is nobody's
    assert torch.equal(
        sum(gathered_whole(everyone[rank : rank + 1])[0] for rank in range(world)), stored_of(matrix, transposed)
    )


def stored_of(matrix, transposed):
    return matrix.t() if transposed else matrix


@pytest.mark.parametrize("block", BLOCKS)
def test_a_copy_that_deepspeed_has_gathered_is_written_too(block):
    matrix = torch.randn(5, 7)
    parameter, new = spread_parameter(matrix, 1, 3, gathered=True), torch.randn_like(read_block(matrix, block))
    ShardedMatrix(parameter).write(block, new)
    write_block(matrix, block, new)
    assert torch.equal(parameter.detach(), matrix)


def test_a_weight_that_is_on_its_way_arrives_before_it_is_written():
    """Else the copy that was asked for before would be what the next forward sees."""
    matrix = torch.randn(5, 7)
    parameter = spread_parameter(matrix, gathered=True)
    parameter.ds_status.name = "INFLIGHT"
    handle = SimpleNamespace(wait=lambda: setattr(parameter.ds_status, "name", "AVAILABLE"))
    flying = {parameter: handle}
    parameter._z3_optimizer = SimpleNamespace(module=SimpleNamespace(ds_inflight_param_registry=flying))
    ShardedMatrix(parameter).write(Slice("row", 1, 2), torch.ones(2, 7))
    assert not flying
    assert bool((parameter.detach()[1:3] == 1).all())


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"nvme_swapper": 1}, "weights on NVMe"),
        ({"ds_zero_param_process_group": 1}, "zero_hpz_partition_size"),
        ({"ds_quant_scale": 1}, "zero_quantized_nontrainable_weights"),
    ],
)
def test_pieces_that_are_refused(mark, message):
    plain = mlp()
    weight = spread_parameter(plain[0].weight.detach())
    plain[0].weight = weight
    vars(weight.ds_tensor if "ds_quant_scale" in mark else weight).update(mark)
    with pytest.raises(UnsupportedError, match=rf"Linear.weight: .* does not work with .*{message}"):
        attach(plain, mode="row", r=2)


class StandIn3(StandIn):
    """As DeepSpeed's optimizer of stage 3; only what is looked at before a first step."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.fp16_groups, self.sub_group_to_group_id = [list(parameters)], {0: 0}
        self.swap_optimizer = self.offload_optimizer = False
        self.partial_offload = 1.0
        off = {"zero_quantized_weights": False, "zero_quantized_nontrainable_weights": False}
        self.parameter_offload = SimpleNamespace(**off)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swap_optimizer": True}, "optimizer state on NVMe"),
        ({"parameter_offload": SimpleNamespace(zero_quantized_weights=True)}, "zero_quantized_weights"),
        ({"offload_optimizer": True, "partial_offload": 0.5}, "offload_optimizer's ratio"),
        ({"offload_optimizer": True, "optimizer": Foreign()}, "Foreign under DeepSpeed's offload_optimizer"),
        ({"zenflow": True}, "zenflow"),
        ({}, "of the kind MiCS_Optimizer"),
    ],
)
def test_settings_of_stage_3_that_are_refused(change, message):
    _, tuner = tuned()
    kind = "DeepSpeedZeroOptimizer_Stage3" if change else "MiCS_Optimizer"
    own = type(kind, (StandIn3,), {})(tuner.parameters())
    vars(own).update(change)
    with pytest.raises(UnsupportedError, match=message):
        ZeroOptimizer(own).check(tuner.parameters(), resets=True, window=False)


def test_slices_made_after_the_engine_are_refused():
    model = mlp(dtype=torch.float32)
    model[0].weight._hp_mapping = None
    attach(model, mode="row", r=2, interval=2)
    with pytest.raises(UnsupportedError, match="DeepSpeed's optimizer holds the weight"):
        model(torch.randn(2, 6))
