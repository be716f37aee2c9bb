"""TRL's trainers with ``peft_config=SliceFineConfig(...)``: each step against plain PyTorch, across moves."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from peft_helpers import THIRD_PARTY, same
from slicefine import movers_of

pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra train)")

from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.generation.vllm_generation import VLLMGeneration  # noqa: E402
from trl.trainer.utils import use_adapter  # noqa: E402

from trl_helpers import (  # noqa: E402
    SENTENCES,
    arguments,
    base_model,
    checked,
    log_probs,
    needs_the_small_llama,
    plain,
    slices,
    tokenizer,
)

pytestmark = [
    *THIRD_PARTY,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # transformers 5 renames the setting
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # there is no accelerator
]
IDS = torch.randint(10, 500, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _small_llama() -> None:
    needs_the_small_llama()


@cache
def loaded() -> Any:
    return base_model()


@cache
def scorer() -> Any:
    torch.manual_seed(5)
    return base_model(AutoModelForSequenceClassification, num_labels=1)


def like() -> Any:
    return copy.deepcopy(loaded())


def like_scorer() -> Any:
    return copy.deepcopy(scorer())


def chats(count: int = 12) -> Any:
    turns = [
        [{"role": "user", "content": f"story {i % 3}"}, {"role": "assistant", "content": SENTENCES[i % 4]}]
        for i in range(count)
    ]
    return datasets.Dataset.from_list([{"messages": turn} for turn in turns])


def preferences(count: int = 12) -> Any:
    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"story {i % 3}"}],
                "chosen": [{"role": "assistant", "content": SENTENCES[i % 4]}],
                "rejected": [{"role": "assistant", "content": SENTENCES[(i + 1) % 4]}],
            }
            for i in range(count)
        ]
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits
    return result


def check_run(trainer: Any, folder: Path, auto: Any = AutoPeftModelForCausalLM) -> None:
    """What every run has to show: comparisons, moves, confined changes, the same logits from its file, a whole base."""
    trainer.note_changes()
    mover = movers_of(trainer.model)[0]
    assert (mover.step, mover.visits, len(set(trainer.slices))) == (5, 3, 3)  # two moves in five steps
    assert trainer.compared == 5 * len(mover.layers)
    assert all(len(changed) > 20 for changed in trainer.changed)
    trainer.save_model(str(folder / "adapter"))
    settings = {} if auto is AutoPeftModelForCausalLM else {"num_labels": 1}
    again = auto.from_pretrained(str(folder / "adapter"), **settings)
    assert torch.equal(logits(again), logits(trainer.model))
    with trainer.model.disable_adapter():
        now = plain(trainer.model)
    assert all(torch.equal(now[name], p) for name, p in loaded().named_parameters() if name in now)


# -- SFT --------------------------------------------------------------------------------------------------------------


def sft_loss(policy: Any, reference: Any, batch: dict[str, Tensor]) -> Tensor:
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    if "position_ids" in batch:  # several documents in one row: each is to be read by itself
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        sizes = [end - start for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]
        documents = list(zip(ids.split(sizes, 1), labels.split(sizes, 1), strict=True))
    else:
        rows = zip(ids, labels, mask.bool(), strict=True)
        documents = [(one[real][None], label[real][None]) for one, label, real in rows]
    losses = [
        F.cross_entropy(policy(input_ids=one).logits[0, :-1], label[0, 1:], reduction="sum") for one, label in documents
    ]
    return torch.stack(losses).sum() / sum((label[:, 1:] != -100).sum() for _, label in documents)


@pytest.mark.parametrize("mode", ["alternate", "column"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_on_chats(tmp_path: Path, packing: bool, mode: str):
    args = arguments(SFTConfig, tmp_path, packing=packing, max_length=64, assistant_only_loss=True)
    run = checked(SFTTrainer, sft_loss, like)(
        base_model(), args, train_dataset=chats(), processing_class=tokenizer(), peft_config=slices(mode)
    )
    run.train()
    trained = run.batch["labels"] != -100
    assert 0 < trained.sum() < trained.numel()
    assert ("position_ids" in run.batch) == packing
    check_run(run, tmp_path)


# -- DPO --------------------------------------------------------------------------------------------------------------


def completion_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found = log_probs(model, batch["input_ids"], batch["attention_mask"])
    return (found * batch["completion_mask"][:, 1:]).sum(1)


def dpo_loss(policy: Any, reference: Any, batch: dict[str, Tensor]) -> Tensor:
    ratios = completion_log_probs(policy, batch) - completion_log_probs(reference, batch)
    chosen, rejected = ratios.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@pytest.mark.parametrize("setting", [None, "gradient_checkpointing", "precompute_ref_log_probs"])
def test_dpo_without_a_reference_model(tmp_path: Path, setting: str | None):
    args = arguments(DPOConfig, tmp_path, beta=0.1, **({} if setting is None else {setting: True}))
    run = checked(DPOTrainer, dpo_loss, like)(
        base_model(), args=args, train_dataset=preferences(), processing_class=tokenizer(), peft_config=slices()
    )
    assert run.ref_model is None
    run.train()
    check_run(run, tmp_path)


def trained_adapter(folder: Path) -> None:
    """An adapter that has moved twice and then made a step."""
    model = get_peft_model(base_model(), slices())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert movers_of(model)[0].visits == 3
    model.save_pretrained(folder)


def test_dpo_that_trains_an_adapter_on_refers_to_a_copy_of_it(tmp_path: Path):
    trained_adapter(tmp_path / "before")
    merged = PeftModel.from_pretrained(base_model(), tmp_path / "before").merge_and_unload().requires_grad_(True)
    model = PeftModel.from_pretrained(base_model(), tmp_path / "before", is_trainable=True)
    start = plain(model)
    args = arguments(DPOConfig, tmp_path, beta=0.1)
    run = checked(DPOTrainer, dpo_loss, lambda: copy.deepcopy(merged))(
        model, args=args, train_dataset=preferences(), processing_class=tokenizer()
    )
    assert set(run.model.peft_config) == {"default", "ref"}
    run.train()
    assert run.compared == 5 * len(movers_of(run.model)[0].layers)
    with use_adapter(run.model, "ref"):
        assert same(plain(run.model), start)
    assert not same(plain(run.model), start)
    with run.model.disable_adapter():
        assert same(plain(run.model), plain(loaded()))


# -- reward model -----------------------------------------------------------------------------------------------------


def reward_loss(policy: Any, reference: Any, batch: dict[str, Tensor]) -> Tensor:
    chosen, rejected = policy(**batch).logits.squeeze(-1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def test_reward_model(tmp_path: Path):
    args = arguments(RewardConfig, tmp_path)
    planned = {"interval": None, "moves": 2, "minimum_steps": 1}  # the trainer tells the run's length
    config = slices(task_type="SEQ_CLS", modules_to_save=["score"], **planned)
    run = checked(RewardTrainer, reward_loss, like_scorer)(
        like_scorer(), args, train_dataset=preferences(), processing_class=tokenizer(), peft_config=config
    )
    run.train()
    check_run(run, tmp_path, AutoPeftModelForSequenceClassification)


# -- GRPO -------------------------------------------------------------------------------------------------------------


def vowels(completions: list[Any], **settings: Any) -> list[float]:
    return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in completions]


def grpo_loss(policy: Any, reference: Any, batch: dict[str, Tensor]) -> Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    kept = batch["completion_ids"].shape[1]
    own, base = (log_probs(model, ids, mask)[:, -kept:] for model in (policy, reference))
    real = batch["completion_mask"]
    torch.testing.assert_close(batch["ref_per_token_logps"] * real, base.detach() * real)
    old = batch.get("old_per_token_logps")
    ratio = (own - (own.detach() if old is None else old)).exp()
    advantage = batch["advantages"][:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    divergence = (base - own).exp() - (base - own) - 1
    per_token = -gain + 0.04 * divergence * ratio
    return ((per_token * real).sum(1) / real.sum(1)).mean()


@pytest.mark.parametrize("iterations", [1, 2])
def test_grpo_with_generation_in_the_loop(tmp_path: Path, iterations: int):
    args = arguments(
        GRPOConfig,
        tmp_path,
        per_device_train_batch_size=4,
        num_generations=4,
        num_iterations=iterations,
        max_completion_length=12,
        beta=0.04,
        loss_type="grpo",
        use_vllm=False,
        gradient_checkpointing=iterations > 1,
    )
    prompts = datasets.Dataset.from_list([{"prompt": text[:12]} for text in SENTENCES * 3])
    run = checked(GRPOTrainer, grpo_loss, like)(
        base_model(), vowels, args, train_dataset=prompts, processing_class=tokenizer(), peft_config=slices()
    )
    run.train()
    assert ("old_per_token_logps" in run.batch) == (iterations > 1)
    assert float(run.batch["advantages"].abs().max()) > 0
    check_run(run, tmp_path)


def test_what_trl_sends_to_vllm_is_the_trained_model():
    model = get_peft_model(base_model(), slices())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    everything = SimpleNamespace(gather_params=lambda params: nullcontext(), is_fsdp=False)
    names = partial(VLLMGeneration._fix_param_name_to_vllm, None)
    sender = SimpleNamespace(model=model, _dist=everything, _fix_param_name_to_vllm=names)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        engine = base_model()
        sent = {name: tensor.clone() for name, tensor in VLLMGeneration._iter_named_params(sender)}
        assert same(sent, plain(model))
        engine.load_state_dict(sent, strict=False)
        assert torch.equal(logits(engine), logits(model))
        loss.backward()  # the forward's weights are still there
        optimizer.step()
    assert movers_of(model)[0].visits == 3
    assert not same(plain(model), plain(loaded()))
