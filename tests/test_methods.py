"""One contract for every method of the registry: what trains, what stays, what is saved, and what merging gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from cli_helpers import ROOT
from slicefine.cli.methods import as_markdown
from slicefine.errors import AdapterFileError, ConfigError, UnsupportedError
from slicefine.methods import Base, Method, find, methods, options_of
from slicefine.methods.base import MethodLayer, block_outputs, merge_layers
from slicefine.methods.files import METHOD_FILE, TENSORS_FILE, load_tensors, save_tensors
from slicefine.mover import movers_of
from slicefine.training.counts import bias_entries

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft"),  # what rivals say of their own settings
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # PEFT's, of its AdaLoRA files
]
IDS = torch.randint(1, 50, (8, 6), generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3
# options that fit models of width 32
SMALL = {
    "slicefine": {"r": 2, "moves": 2, "interval": 10},
    "oft": {"oft_block_size": 8},
    "supertuning": {"sparsity": 0.9},
    "vera": {"r": 16},
    "lora_xs": {"r": 4},
}
STEPS = 30


def bert() -> Base:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=3,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config).eval()
    return Base(_louder(model), ("classifier",), task_type="SEQ_CLS", steps=STEPS)


def llama() -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return Base(_louder(LlamaForCausalLM(config).eval()), task_type="CAUSAL_LM", steps=STEPS)


def _louder(model: nn.Module) -> nn.Module:
    """Weights large enough for inputs to matter, as in a trained model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(5)
    return model


FAMILIES = {"bert": bert, "llama": llama}
# what a family lacks
LACKING = {("head", "llama"): "trains a new head", ("bitfit", "llama"): "trains biases", ("diffit", "llama"): "biases"}
CASES = [(name, family) for name in methods() for family in FAMILIES if (name, family) not in LACKING]


def build(name: str, base: Base) -> tuple[Method, dict[str, Any], nn.Module]:
    method = find(name)
    options = options_of(method, SMALL.get(name, {}))
    torch.manual_seed(0)
    return method, options, method.build(base, options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


def train(model: nn.Module, method: Method, options: dict[str, Any], base: Base, steps: int = STEPS) -> list[float]:
    """Losses of a plain loop that does what the Trainer does for a method."""
    model.train()
    rate = method.learning_rate
    if method.optimizer is not None:
        optimizer: Any = method.optimizer(model, options, rate, 0.0)
    else:
        factor = method.groups or (lambda name, options: 1.0)
        own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [{"params": [p], "lr": rate * factor(n, options)} for n, p in own]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    labels = LABELS if base.head else IDS
    losses = []
    for step in range(steps):
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels).loss
        losses.append(float(loss.detach()))
        if method.penalty is not None:
            loss = loss + method.penalty(model, step / steps)
        loss.backward()
        optimizer.step()
        if method.after_step is not None:
            method.after_step(model, step + 1, steps)
        optimizer.zero_grad()
    model.eval()
    return losses


def trained_entries(model: nn.Module, base: Base) -> int:
    head = sum(p.numel() for name in base.head for p in base.model.get_submodule(name).parameters() if p.requires_grad)
    movers = movers_of(model)
    if movers:  # a slice's padding does not train
        return sum(mover.active_entries() for mover in movers)
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - head


def head_entries(base: Base) -> int:
    return sum(p.numel() for name in base.head for p in base.model.get_submodule(name).parameters())


@pytest.mark.parametrize(("name", "family"), CASES)
def test_trained_entries_follow_the_formula(name: str, family: str):
    base = FAMILIES[family]()
    heads = head_entries(base)
    expected = find(name).count(base, options_of(find(name), SMALL.get(name, {})))
    _, _, model = build(name, base)
    found = (
        trained_entries(model, base)
        if movers_of(model)
        else sum(p.numel() for p in model.parameters() if p.requires_grad) - heads
    )
    assert found == expected


@pytest.mark.parametrize("bias", ["all", "slicefine_only"])
def test_biases_beside_slices_are_counted(bias: str):
    base, method = bert(), find("slicefine")
    options = options_of(method, {**SMALL.get("slicefine", {}), "bias": bias})
    expected = method.count(base, options)
    without = method.count(base, {**options, "bias": "none"})
    whole = [name for name, _ in base.model.named_parameters() if name.endswith(".bias") and "classifier" not in name]
    if bias == "slicefine_only":
        whole = [name for name in whole if "LayerNorm" not in name]
    assert expected - without == sum(base.model.get_parameter(name).numel() for name in whole)
    model = method.build(base, options)
    assert bias_entries(model) == expected - without
    assert movers_of(model)[0].active_entries() == without


def test_biases_of_packed_attention_are_biases():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)

    base = Base(Attention())
    assert find("bitfit").count(base, {}) == 24 + 8 + 8
    trained = {n for n, p in find("bitfit").build(base, {}).named_parameters() if p.requires_grad}
    assert trained == {"attention.in_proj_bias", "attention.out_proj.bias", "norm.bias"}


@pytest.mark.parametrize(("name", "family"), CASES)
def test_outputs_begin_at_the_base(name: str, family: str):
    base = FAMILIES[family]()
    before = logits(base.model)
    method, _, model = build(name, base)
    after = logits(model.eval())[..., -before.shape[-2] :, :]  # a prompt comes first
    if method.starts_at_base:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(after, before)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_loss_falls_and_what_is_frozen_stays(name: str, family: str):
    base = FAMILIES[family]()
    method, options, model = build(name, base)
    # a slice's own weight is written by its mover
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad and name != "slicefine"}
    losses = train(model, method, options, base)
    assert losses[-1] < losses[0] - 1e-3, losses
    after = dict(model.named_parameters())
    for key, value in frozen.items():
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize(("name", "family"), CASES)
def test_saved_and_loaded_outputs_are_equal(name: str, family: str, tmp_path: Path):
    base = FAMILIES[family]()
    method, options, model = build(name, base)
    train(model, method, options, base, 6)
    expected = logits(model)
    fresh = FAMILIES[family]()
    if method.saves == "adapter":
        from peft import PeftModel

        model.save_pretrained(str(tmp_path))  # type: ignore[operator]
        loaded: nn.Module = PeftModel.from_pretrained(fresh.model, str(tmp_path))  # type: ignore[arg-type]
    elif method.saves == "tensors":
        save_tensors(model, method, options, tmp_path)
        loaded = load_tensors(fresh, method, tmp_path)
        size = (tmp_path / TENSORS_FILE).stat().st_size
        assert size < 16384 + 4 * 4 * (method.count(FAMILIES[family](), options) + head_entries(base))
    else:
        model.save_pretrained(str(tmp_path))  # type: ignore[operator]
        loaded = type(model).from_pretrained(str(tmp_path))  # type: ignore[attr-defined]
    if name == "adalora":  # its file leaves pruned ranks out, so that sums have other terms
        torch.testing.assert_close(logits(loaded.eval()), expected)
    else:
        assert torch.equal(logits(loaded.eval()), expected)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_merging_changes_no_output(name: str, family: str):
    base = FAMILIES[family]()
    plain = {n: tuple(p.shape) for n, p in base.model.named_parameters()}
    method, options, model = build(name, base)
    train(model, method, options, base, 6)
    expected = logits(model)
    if method.saves == "adapter":
        if not method.merges:
            with pytest.raises((AttributeError, NotImplementedError, TypeError, ValueError)):
                model.merge_and_unload()  # type: ignore[operator]
            return
        merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
    elif method.merges:
        merged = merge_layers(model)
    else:
        with pytest.raises(UnsupportedError, match="keep it apart"):
            merge_layers(model)
        return
    torch.testing.assert_close(logits(merged.eval()), expected, rtol=1e-4, atol=1e-4)
    after = {n: tuple(p.shape) for n, p in merged.named_parameters()}
    assert {n: s for n, s in after.items() if n in plain} == plain
    assert all(n.endswith(".bias") for n in after.keys() - plain.keys())  # layers without one may gain it
    assert not any(isinstance(module, MethodLayer) for module in merged.modules())


@pytest.mark.parametrize(("name", "family"), LACKING)
def test_a_model_without_what_the_method_trains_is_refused(name: str, family: str):
    if name not in methods():
        pytest.skip(f"{name} is not in the registry")
    with pytest.raises((ConfigError, UnsupportedError), match=LACKING[name, family]):
        build(name, FAMILIES[family]())


def test_every_method_says_where_it_comes_from():
    for method in methods().values():
        assert method.title
        assert method.formula
        assert method.source
        assert method.learning_rate > 0
        assert method.name == method.name.lower()


PAPER = {  # Appendix F and Tables 1, 2, 5, 6, 7
    *("full", "houlsby", "mam", "propetl_adapter", "propetl_prefix", "propetl_lora", "prompt", "prefix", "bitfit"),
    *("layernorm", "ia3", "diff_pruning", "lora", "adalora", "lokr", "lora_fa", "lora_xs", "loha", "vera", "hra"),
    *("miss", "shira", "propulsion", "rocoft", "sft", "moslora", "slicefine"),
}
WANTED = {"head", "dora", "rslora", "pissa", "lora_plus", "oft", "boft", "lily", "hira", "supertuning", "diffit"}


def test_none_of_the_papers_baselines_is_missing():
    assert not (PAPER | WANTED) - set(methods())


def test_the_page_of_methods_is_generated():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page.endswith(as_markdown()), "write the output of `slicefine methods --markdown` into docs/methods.md"


def test_options_are_checked():
    lora = find("lora")
    assert options_of(lora, {"r": 4})["r"] == 4
    for given, message in (
        ({"rank": 4}, "lora has no rank; its options are: r, alpha, dropout"),
        ({"r": 0}, "method.options.r=0: expected a number like 8"),
        ({"r": 2.5}, "method.options.r=2.5: expected a number like 8"),
        ({"r": "8"}, "method.options.r='8': expected a number like 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            options_of(lora, given)
    with pytest.raises(ConfigError, match=r"head has no r; its options are: none"):
        options_of(find("head"), {"r": 1})
    with pytest.raises(ConfigError, match=r"method.name='lorra' is unknown; expected one of full, head"):
        find("lorra")


def test_targets_follow_the_settings():
    base = bert()
    everything = base.targets()
    assert "classifier" not in everything
    assert all(name.startswith("bert.") for name in everything)
    chosen = copy.copy(base)
    object.__setattr__(chosen, "target_modules", ["query", "value"])
    assert len(chosen.targets()) == 4
    object.__setattr__(chosen, "layers_to_transform", [1])
    assert chosen.targets() == [
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.self.value",
    ]
    attention, feed_forward = block_outputs(chosen)
    assert attention == ["bert.encoder.layer.1.attention.output.dense"]
    assert feed_forward == ["bert.encoder.layer.1.output.dense"]
    object.__setattr__(chosen, "layers_to_transform", [2, -1])
    with pytest.raises(ConfigError, match=r"slice.layers_to_transform=\[2, -1\]: the model has the blocks 0 to 1"):
        chosen.targets()
    object.__setattr__(chosen, "target_modules", ["nothing"])
    with pytest.raises(ConfigError, match="matches no dense layer"):
        chosen.targets()
    assert "lm_head" not in llama().targets()


def test_adalora_prunes_its_ranks_and_lora_plus_has_two_rates():
    base = bert()
    method, options, model = build("adalora", base)
    ranks = lambda: sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)  # noqa: E731
    train(model, method, options, base)
    layers = len(base_layers(model))
    assert ranks() <= options["target_r"] * layers
    plus = find("lora_plus")
    assert plus.groups is not None
    assert plus.groups("x.lora_B.default.weight", plus.options) == 16.0
    assert plus.groups("x.lora_A.default.weight", plus.options) == 1.0


def base_layers(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_parameters() if "lora_E" in n]


def damaged(write: Callable[[Path], object], tmp_path: Path, message: str) -> None:
    base = bert()
    method, options, model = build("bitfit", base)
    save_tensors(model, method, options, tmp_path)
    write(tmp_path)
    with pytest.raises(AdapterFileError, match=message):
        load_tensors(bert(), method, tmp_path)


def test_damaged_files_are_refused(tmp_path: Path):
    import safetensors.torch

    damaged(lambda f: (f / METHOD_FILE).unlink(), tmp_path, "method.json is missing; copy the whole folder")
    damaged(lambda f: (f / TENSORS_FILE).write_bytes(b"x" * 40), tmp_path, "cannot be read")
    damaged(lambda f: (f / METHOD_FILE).write_text("{"), tmp_path, "not readable as JSON")
    damaged(
        lambda f: (f / METHOD_FILE).write_text('{"version": 1, "method": "lora"}'), tmp_path, "expected version 1 of"
    )
    one = {"bert.pooler.dense.bias": torch.zeros(32)}
    damaged(lambda f: safetensors.torch.save_file(one, f / TENSORS_FILE), tmp_path, "do not fit the model")
