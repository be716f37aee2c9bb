"""Several processes: the trajectory is that of one process, whatever wraps the model.

The oracle is a single process on the whole batch, which the other tests compare with the reference twin.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import distributed_jobs as jobs
from peft_helpers import THIRD_PARTY

pytestmark = THIRD_PARTY

JOBS = ["ddp", "ddp_resumed", "ddp_unlike", "trainer_ddp", "trainer_ddp_resumed", "fsdp2", "fsdp2_kept"]


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


def of(found, job):
    """Both ranks' results of one job; a failed one shows its traceback."""
    for rank, result in enumerate(found[job]):
        assert "failed" not in result, f"rank {rank}:\n{result['failed']}"
    return found[job]


def same_trajectory(one, other):
    """The same visits on every layer, and weights and parameters alike."""
    for mine, its in zip(one["visits"], other["visits"], strict=True):
        assert torch.equal(mine, its)
    for key in ("weights", "active", "originals"):
        for mine, its in zip(one[key], other[key], strict=True):
            assert_close(mine, its)


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


@pytest.mark.parametrize("mode", ["row", "column"])
def test_fsdp2_that_keeps_parameters_gathered(mode, found, alone):
    for result in of(found, "fsdp2_kept"):
        same_trajectory(result[mode], alone[mode])


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
