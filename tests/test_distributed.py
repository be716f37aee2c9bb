"""Several processes: the trajectory is that of one process, whatever wraps the model.

The oracle is a single process on the whole batch, which the other tests compare with the reference twin.
"""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.testing import assert_close
from torch.torch_version import TorchVersion

import distributed_jobs as jobs
import sharded_jobs as sharded
from core_helpers import batches, lines_of, step
from peft_helpers import THIRD_PARTY, config, llama
from slicefine.errors import UnsupportedError
from slicefine.journal import read_table
from slicefine.peft import sharded_checkpoints
from slicefine.schedule import Schedule
from slicefine.training.gpus import loads, shape_of

pytestmark = [
    *THIRD_PARTY,
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"),
        reason="FSDP2 of this PyTorch needs a GPU, where the tests have none",
    ),
]

RECENT = torch.__version__ >= TorchVersion("2.13")  # 2.9 is another, the versions between were not tried
PIPELINES = RECENT  # 2.9 ends a process in its own send
# FSDP2 of 2.9 does some of its arithmetic in float32: a model of float64 without slices is off by 4e-8 there
FSDP2_ROUNDS: dict[str, float] = {} if RECENT else {"atol": 1e-6, "rtol": 1e-5}
JOBS = [jobs.ddp, jobs.ddp_resumed, jobs.ddp_unlike, jobs.trainer_ddp, jobs.trainer_ddp_resumed, jobs.epoch_order]
JOBS += [jobs.pipeline] if PIPELINES else []
JOBS += [sharded.fsdp2, sharded.fsdp2_kept, sharded.fsdp2_variants, sharded.fsdp2_precision, sharded.fsdp2_saves]
JOBS += [sharded.fsdp2_traffic, sharded.fsdp2_resumed, sharded.fsdp2_guards, sharded.peft_fsdp2]
JOBS += [sharded.peft_biases]
JOBS += [sharded.trainer_fsdp2, sharded.peft_sharded_file, sharded.trainer_fsdp2_sharded]
RESUMED = [sharded.trainer_fsdp2_resumed, sharded.trainer_fsdp2_sharded_resumed]
JOBS += RESUMED if sharded.RESUMES else []

resumes = pytest.mark.skipif(not sharded.RESUMES, reason="below 1.15 accelerate loses a part of FSDP2's checkpoints")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(folder):
    """One process, in every mode, with a checkpoint on the way; and through `Trainer`."""
    found = {}
    for mode in jobs.MODES:
        model, tuner = jobs.tune(mode)
        optimizer = jobs.adamw(tuner.parameters())
        jobs.loop(model, optimizer, range(jobs.SAVED))
        jobs.checkpoint(tuner, optimizer, folder / f"one-{mode}")
        jobs.loop(model, optimizer, range(jobs.SAVED, jobs.STEPS))
        found[mode] = jobs.facts(tuner)
    return found | {"trainer": jobs.trainer_run(folder / "trainer-one", 1)}


@pytest.fixture(scope="module")
def found(alone, folder):
    """What two processes found, job by job."""
    return jobs.launch(JOBS, folder)


@pytest.fixture(scope="module")
def four(found, folder):
    """What four processes found; some go on from what two wrote."""
    work = [jobs.ddp_four, sharded.fsdp2_four] + ([sharded.trainer_fsdp2_four] if sharded.RESUMES else [])
    return jobs.launch(work, folder, world=4)


def of(found, job):
    """All ranks' results of one job; a failed one shows its traceback."""
    for rank, result in enumerate(found[job]):
        assert "failed" not in result, f"rank {rank}:\n{result['failed']}"
    return found[job]


def same_trajectory(one, other, **tolerances):
    """The same visits on every layer, and weights and parameters alike."""
    for mine, its in zip(one["visits"], other["visits"], strict=True):
        assert torch.equal(mine, its)
    for key in ("weights", "active", "originals"):
        for mine, its in zip(one[key], other[key], strict=True):
            assert_close(mine, its, **tolerances)


@pytest.mark.parametrize("mode", jobs.MODES)
def test_ddp_gives_the_trajectory_of_one_process(mode, found, alone):
    for result in of(found, "ddp"):
        assert len(result[mode]["visits"][0]) == 5
        same_trajectory(result[mode], alone[mode])
        for mine, its in zip(result[mode]["originals"], alone[mode]["originals"], strict=True):
            assert torch.equal(mine, its)


def test_ranks_hold_the_same_bits(found):
    first, second = of(found, "ddp")
    for mode in jobs.MODES:
        for mine, its in zip(first[mode]["weights"], second[mode]["weights"], strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("mode", jobs.MODES)
def test_a_checkpoint_of_two_processes_goes_on_in_one(mode, found, alone, folder):
    of(found, "ddp")
    model, tuner, optimizer = jobs.resume(mode, folder / f"two-{mode}")
    jobs.loop(model, optimizer, range(jobs.SAVED, jobs.STEPS))
    same_trajectory(jobs.facts(tuner), alone[mode])


@pytest.mark.parametrize("mode", jobs.MODES)
def test_a_checkpoint_of_one_process_goes_on_in_two(mode, found, alone):
    for result in of(found, "ddp_resumed"):
        same_trajectory(result[mode], alone[mode])


def test_ranks_that_attached_to_other_weights_get_those_of_rank_0(found, alone):
    for result in of(found, "ddp_unlike"):
        same_trajectory(result, alone["alternate"])


@pytest.mark.parametrize("mode", jobs.MODES)
def test_fsdp2_gives_the_trajectory_of_one_process(mode, found, alone):
    for result in of(found, "fsdp2"):
        same_trajectory(result[mode], alone[mode])


@pytest.mark.parametrize("job", ["ddp_four", "fsdp2_four"])
def test_four_processes_give_the_trajectory_of_one(job, four, alone):
    results = of(four, job)
    assert len(results) == 4
    for result in results:
        assert len(result["visits"][0]) == 5
        same_trajectory(result, alone["alternate"])
        for mine, its in zip(result["weights"], results[0]["weights"], strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("mode", ["row", "column"])
def test_fsdp2_that_keeps_parameters_gathered(mode, found, alone):
    for result in of(found, "fsdp2_kept"):
        same_trajectory(result[mode], alone[mode])


@pytest.mark.parametrize("name", sharded.VARIANTS)
def test_fsdp2_with_every_setting_that_touches_parameters(name, found):
    expected = jobs.alone(**sharded.VARIANTS[name])
    for result in of(found, "fsdp2_variants"):
        same_trajectory(result[name], expected, **FSDP2_ROUNDS)


@pytest.mark.parametrize("name", sharded.PRECISIONS)
def test_fsdp2_in_mixed_precision(name, found):
    expected = sharded.alone_rounded(name)
    first = jobs.mlp(dtype=sharded.PRECISIONS[name])
    for result in of(found, "fsdp2_precision"):
        for layer, weight in enumerate(result[name]["weights"]):
            assert weight.dtype == sharded.PRECISIONS[name]
            assert_close(weight, expected["weights"][layer], atol=4e-3, rtol=2e-2)
            assert (weight - first[2 * layer].weight).abs().max() > 0.02  # trained by more than that
            block = read_table(result[name]["visits"][layer])[-1].slice
            lines = lines_of(weight, block)
            master = result[name]["active"][layer][: lines.shape[0], : lines.shape[1]]
            assert torch.equal(master.to(weight.dtype), lines)


def test_saving_on_the_way_disturbs_nothing(found, alone):
    for result in of(found, "fsdp2_saves"):
        same_trajectory(result, alone["alternate"])


def test_a_sharded_run_writes_the_file_of_one_process(found, alone, folder):
    of(found, "fsdp2_saves")
    one, two = (load_file(folder / f"{name}.safetensors") for name in ("one-alternate", "sharded"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype
        assert_close(tensor, two[key])


@pytest.mark.parametrize("name", ["before", "after", "dcp"])
def test_a_sharded_run_resumes(name, found, alone):
    """What one process wrote, read before or after sharding, and a sharded checkpoint."""
    for result in of(found, "fsdp2_resumed"):
        same_trajectory(result[name], alone["alternate"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # so it is
@pytest.mark.parametrize("name", ["file", "dcp", "full"])
def test_one_process_resumes_a_sharded_run(name, found, alone, folder):
    of(found, "fsdp2_saves")
    model, tuner = jobs.tune("alternate")
    optimizer = jobs.adamw(tuner.parameters())
    if name == "dcp":
        sharded.from_dcp(model, optimizer, folder / "dcp")
    else:
        whole = torch.load(folder / "full.pt")
        if name == "file":
            tuner.load(folder / "sharded.safetensors")
        else:
            model.load_state_dict(whole["model"])
        set_optimizer_state_dict(model, optimizer, whole["optimizer"], options=StateDictOptions(full_state_dict=True))
    jobs.loop(model, optimizer, range(jobs.SAVED, jobs.STEPS))
    same_trajectory(jobs.facts(tuner), alone["alternate"])


def test_content_that_returns_before_backward_does_no_harm(found):
    for result in of(found, "fsdp2_guards"):
        for reshard in (True, False):
            plain, disturbed = result[f"restored, {reshard}"]
            for mine, its in zip(plain, disturbed, strict=True):
                assert torch.equal(mine, its)
                assert mine.abs().max() > 0


def test_backward_over_other_content_is_refused(found):
    for result in of(found, "fsdp2_guards"):
        for reshard in (True, False):
            assert "weights changed between forward and backward" in result[f"moved, {reshard}"]


def test_disabled_slices_show_the_base_model(found):
    for result in of(found, "fsdp2_guards"):
        for reshard in (True, False):  # else they stay gathered, and the gathered copies are written to as well
            trained, plain, again, base = result[f"outputs, {reshard}"]
            assert torch.equal(trained, again)
            assert_close(plain, base)
            assert (trained - base).abs().max() > 1e-3


REFUSED = {
    "attached too late": "Make the slices first .*, then fully_shard",
    "tensor parallel": "leave tensor parallelism out",
    "tensor parallel later": "instead of parallelize_module or tp_plan",
    "no values": "fsdp_cpu_ram_efficient_loading: false",
    "fold": "load them in one process, and merge there",
    "ignored": "Leave slicefine_active out of ignored_params",
    "fsdp1": "Use FSDP2",
    "fsdp1 with original parameters": "Use FSDP2",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name(name, found):
    for result in of(found, "fsdp2_guards"):
        assert re.search(REFUSED[name], result[name])


def test_peft_under_fsdp2_saves_the_adapter_of_one_process(found, folder):
    model = get_peft_model(jobs.llama(), jobs.peft_config())
    losses = jobs.peft_loop(model, 0, 1)
    model.save_pretrained(folder / "peft-one")
    ranks = [result["losses"] for result in of(found, "peft_fsdp2")]
    assert [sum(pair) / 2 for pair in zip(*ranks, strict=True)] == pytest.approx(losses, abs=1e-4)
    one, two = (load_file(folder / name / "adapter_model.safetensors") for name in ("peft-one", "peft-two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert_close(tensor, two[key], atol=1e-4, rtol=1e-3)
    for name in ("peft-one", "peft-two"):
        assert "layout" in (folder / name / "adapter_config.json").read_text()


def test_biases_train_as_in_one_process(found, folder):
    model = sharded.biased_llama()
    losses = jobs.peft_loop(model, 0, 1)
    expected = sharded.bias_facts(model)
    model.save_pretrained(folder / "biases-one")
    for engine in ("ddp", "fsdp2"):
        results = of(found, "peft_biases")
        both = [result[engine]["losses"] for result in results]
        assert [sum(pair) / 2 for pair in zip(*both, strict=True)] == pytest.approx(losses)
        for result in results:
            for made in (result[engine], result[f"{engine}, loaded"]):
                for mine, its in zip(made["trained"], expected["trained"], strict=True):
                    assert_close(mine, its)
                for mine, its in zip(made["off"], expected["off"], strict=True):
                    assert torch.equal(mine, its)  # zeros
        for name in (f"biases-{engine}", f"biases-{engine}-off"):
            one, two = (load_file(folder / f / "adapter_model.safetensors") for f in ("biases-one", name))
            assert one.keys() == two.keys()
            for key, tensor in one.items():
                assert_close(tensor, two[key])
    assert all(bool(bias.abs().max() > 0) for bias in expected["trained"])


def test_saving_an_adapter_gathers_slices_and_no_weights(found):
    smallest = 16 * 16 * 4  # bytes of the smallest weight
    for result in of(found, "peft_fsdp2"):
        assert 0 < result["largest"] < smallest


def test_what_is_sent_is_what_the_planner_says(found):
    """Of our own: each step the parameters' values, and at a move a check of them and the blocks that come next."""
    shape = shape_of(jobs.mlp())
    assert shape.parameters == sum(p.numel() for p in jobs.mlp().parameters())
    entries = sum(2 * columns for _, columns in shape.matrices)
    (load,) = [x for x in loads(shape, Schedule("row", 2, 2), 2, 8) if (x.method, x.engine) == ("slices", "FSDP2")]
    assert load.entries == entries
    for result in of(found, "fsdp2_traffic"):
        assert result["step"] == 8 * entries  # float64 here, where the planner speaks of fp32
        assert result["move"] == 8 * entries + 8 * entries


def same_run(one, other, losses=slice(None)):
    assert one["visits"].keys() == other["visits"].keys()
    for name, table in one["visits"].items():
        assert torch.equal(table, other["visits"][name])
        assert_close(one["weights"][name], other["weights"][name])
    assert one["losses"][losses] == pytest.approx(other["losses"][losses], abs=1e-4)


def test_trainer_gives_the_run_of_one_process(found, alone):
    for result in of(found, "trainer_ddp"):
        assert {len(table) for table in result["visits"].values()} == {4}
        same_run(result, alone["trainer"], slice(0, 0) if not result["losses"] else slice(None))


def test_trainer_resumes_on_two_processes_what_one_began(found, alone):
    for result in of(found, "trainer_ddp_resumed"):
        same_run(result, alone["trainer"])


def test_trainer_resumes_in_one_process_what_two_began(found, alone, folder):
    of(found, "trainer_ddp")
    again = jobs.trainer_run(folder / "trainer-alone", 1, str(folder / "trainer-two" / "checkpoint-3"))
    same_run(again, alone["trainer"])


def test_each_process_draws_its_own_order_of_an_epoch_again(found):
    """Dropout on texts of unlike lengths draws unlike numbers; a checkpoint has one file for all processes."""
    for rank in of(found, "epoch_order"):
        assert rank == {"unlike": (2, True), "alike": (1, True)}


def test_trainer_under_fsdp2_gives_the_run_of_one_process(found, alone, folder):
    for result in of(found, "trainer_fsdp2"):
        same_run(result, alone["trainer"])
    one, two = (
        load_file(folder / name / "checkpoint-6" / "adapter_model.safetensors")
        for name in ("trainer-one", "trainer-fsdp2")
    )
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert_close(tensor, two[key], atol=1e-4, rtol=1e-3)


@resumes
@pytest.mark.parametrize("job", ["trainer_fsdp2_resumed", "trainer_fsdp2_sharded_resumed"])
def test_trainer_under_fsdp2_resumes(job, found, alone):
    for result in of(found, job):
        same_run(result, alone["trainer"], slice(3, None))


@resumes
@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_trainer_under_fsdp2_resumes_on_more_processes(kind, found, four, alone):
    of(found, "trainer_fsdp2_sharded")
    for result in of(four, "trainer_fsdp2_four"):
        same_run(result[kind], alone["trainer"], slice(3, None))


@pytest.mark.parametrize(
    ("kind", "loader", "version", "message"),
    [
        ("FULL", "load_fsdp_model", "1.15", r"before 1.15 reads an adapter on rank 0 only .*Install accelerate 1.15"),
        ("SHARDED", "load_fsdp_optimizer", "1.13", r"before 1.13 leaves the optimizer's state out .*accelerate 1.13"),
    ],
)
def test_a_checkpoint_of_which_a_part_would_be_lost_is_refused(monkeypatch, kind, loader, version, message):
    """By versions of accelerate that the tests do not run with; in one process nothing is lost."""
    monkeypatch.setattr(sharded_checkpoints, "compare_versions", lambda library, sign, wanted: wanted == version)
    model = get_peft_model(llama(), config("row"))
    loaded = []

    def load(fsdp_plugin, accelerator, model, input_dir, model_index=0, adapter_only=False):
        loaded.append(model)

    trainer = SimpleNamespace(load_fsdp_model=load, load_fsdp_optimizer=load)
    sharded_checkpoints.install_sharded_loading(trainer)
    plugin = SimpleNamespace(state_dict_type=f"{kind}_STATE_DICT")
    two, alone, plain = (
        SimpleNamespace(is_fsdp2=fsdp2, num_processes=count) for fsdp2, count in ((True, 2), (True, 1), (False, 2))
    )
    with pytest.raises(UnsupportedError, match=message):
        getattr(trainer, loader)(plugin, two, model, "", adapter_only=True)
    assert loaded == []
    for accelerator, tuned in ((alone, model), (plain, model), (two, llama())):
        getattr(trainer, loader)(plugin, accelerator, tuned, "", adapter_only=True)
    assert len(loaded) == 3


def test_an_adapter_in_parts_is_read_with_head_and_biases(found):
    for result in of(found, "peft_sharded_file"):
        (saved, loaded), (visits, again) = result["parameters"], result["visits"]
        assert saved.keys() == loaded.keys()
        for name, tensor in saved.items():
            assert torch.equal(tensor, loaded[name]), name
        assert len(visits[0]) == 4
        for mine, its in zip(visits, again, strict=True):
            assert torch.equal(mine, its)
        assert re.search("the checkpoint lacks .*norm.weight .*Resume with the configuration", result["refused"])


@pytest.mark.skipif(not PIPELINES, reason="torch.distributed.pipelining of this PyTorch does not run on a CPU")
def test_two_stages_of_a_pipeline_are_one_model(found):
    model, tuner = jobs.tune("alternate")
    optimizer = jobs.adamw(tuner.parameters())
    for x, y in batches(jobs.STEPS):
        step(model, optimizer, x, y)
    expected = jobs.facts(tuner)
    first, second = of(found, "pipeline")
    same_trajectory({key: first[key] + second[key] for key in first}, expected)


def test_a_step_that_only_creates_state_is_none():
    """torch.distributed.checkpoint steps a new optimizer with a rate of zero and zeros for gradients."""
    model, tuner = jobs.tune("row")
    optimizer = jobs.adamw(tuner.parameters())
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state
    assert (tuner.mover.step, tuner.mover.visits) == (0, 1)
    x, y = batches(1)[0]
    optimizer.param_groups[0]["lr"] = 0.0  # a warm-up's first step has gradients
    step(model, optimizer, x, y)
    assert tuner.mover.step == 1


def test_a_killed_process_ends_the_run_which_resumes(alone, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={jobs.free_port()}", jobs.__file__, str(folder / "killed")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode != 0
    assert "Signal 9 (SIGKILL)" in ended.stderr
    assert not (folder / "killed" / "checkpoint-6").exists()
    again = jobs.trainer_run(folder / "killed-again", 1, str(folder / "killed" / "checkpoint-3"))
    same_run(again, alone["trainer"])
