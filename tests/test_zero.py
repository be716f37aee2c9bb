"""DeepSpeed's ZeRO: stages 1 and 2 give the run of one process, what does not is refused by name.

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
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import distributed_jobs as jobs
import zero_jobs as zero
from core_helpers import mlp
from peft_helpers import THIRD_PARTY, llama
from slicefine import attach
from slicefine.errors import NumericalError, OptimizerError, UnsupportedError

pytestmark = THIRD_PARTY
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)"
)

JOBS = [zero.zero2, zero.zero2_resumed, zero.zero1, zero.zero2_variants, zero.zero2_bf16, zero.zero2_skips]
JOBS += [zero.zero2_offload, zero.zero2_head, zero.zero2_accelerate, zero.zero_refused]


# -- real processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def found(folder):
    """What two processes found, job by job."""
    return jobs.launch(JOBS, folder)


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
        "stage 3": r"ZeRO stage 3 .* Use ZeRO stage 2",
        "window": r"window= .* Train all layers at once, or use FSDP2",
        "adafactor": "Adafactor under ZeRO.* Use AdamW, or FSDP2",
        "accumulation in fp32": "BF16_Optimizer.*leave data_types out",
        "head": "a group of AdamW holds 4 slices and 1 other parameters .* a group of their own",
    }.items(),
)
def test_what_stays_refused(name, message, found):
    for result in of(found, "zero_refused"):
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


def test_stage_3_is_refused_before_and_after_slices_are_made():
    model, tuner = tuned()
    model.get_submodule("0").base_layer.weight.ds_id = 0
    for act in (lambda: model(torch.randn(2, 6)), lambda: tuner.mover.begin_run(10)):
        with pytest.raises(UnsupportedError, match=r"ZeRO stage 3 .* Use ZeRO stage 2"):
            act()
    plain = mlp()
    plain[0].weight.ds_id = 0
    with pytest.raises(UnsupportedError, match=r"Linear.weight: DeepSpeed's ZeRO stage 3"):
        attach(plain, mode="row", r=2)


def test_slices_made_after_the_engine_are_refused():
    model = mlp(dtype=torch.float32)
    model[0].weight._hp_mapping = None
    attach(model, mode="row", r=2, interval=2)
    with pytest.raises(UnsupportedError, match="DeepSpeed's optimizer holds the weight"):
        model(torch.randn(2, 6))
