"""Methods that PEFT implements: a configuration each, the formula of its trained entries, what training needs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, UnsupportedError
from .base import Base, Method, Options, block_outputs, numbers

__all__ = ["METHODS"]

_LOW_RANK = {"r": 8, "alpha": 16, "dropout": 0.0}


def _wrap(base: Base, config: type, **settings: Any) -> nn.Module:
    """PEFT's model with a configuration; settings of targets are given where the configuration takes them."""
    from peft import get_peft_model

    shared = {
        "target_modules": base.target_modules,
        "exclude_modules": base.exclude_modules,
        "layers_to_transform": base.layers_to_transform,
    }
    known = inspect.signature(config).parameters
    taken = {name: value for name, value in {**shared, **settings}.items() if name in known and value is not None}
    made = config(task_type=base.task_type, modules_to_save=list(base.head) or None, **taken)
    try:
        model: nn.Module = get_peft_model(base.model, made)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError, AttributeError) as error:
        raise UnsupportedError(f"{config.__name__} does not fit {type(base.model).__name__}: {error}") from error
    return model


def _lora(base: Base, options: Options, **more: Any) -> nn.Module:
    from peft import LoraConfig

    settings = {"r": options["r"], "lora_alpha": options["alpha"], "lora_dropout": options["dropout"], **more}
    return _wrap(base, LoraConfig, **settings)


def _lora_fa(base: Base, options: Options) -> nn.Module:
    model = _lora(base, options)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def _lora_fa_optimizer(model: nn.Module, options: Options, rate: float, decay: float) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    made: torch.optim.Optimizer = create_lorafa_optimizer(
        model,  # type: ignore[arg-type]
        r=options["r"],
        lora_alpha=options["alpha"],
        lr=rate,
        weight_decay=decay,
    )
    return made


def _adalora(base: Base, options: Options) -> nn.Module:
    from peft import AdaLoraConfig

    if options["target_r"] > options["r"]:
        raise ConfigError(
            f"method.options: adalora begins with r={options['r']} and cannot end with target_r={options['target_r']}; "
            "choose a smaller target_r."
        )
    return _wrap(
        base,
        AdaLoraConfig,
        init_r=options["r"],
        target_r=options["target_r"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        total_step=base.steps,
        tinit=base.steps // 10,  # a tenth of warm-up, and half of the run with the final ranks, as in its GLUE recipes
        tfinal=base.steps // 2,
        deltaT=max(1, base.steps // 100),
        orth_reg_weight=options["orth_reg_weight"],
    )


def _adalora_step(model: nn.Module, step: int, steps: int) -> None:
    model.base_model.update_and_allocate(step)  # type: ignore[operator, union-attr]


def _named(config: str, *, seeded: str | None = None, **fixed: Any) -> Callable[[Base, Options], nn.Module]:
    """Build by handing a method's options over under the configuration's own names."""

    def build(base: Base, options: Options) -> nn.Module:
        import peft

        seed = {} if seeded is None else {seeded: base.seed}
        return _wrap(base, getattr(peft, config), **{**options, **fixed, **seed})

    return build


def ia3_layers(base: Base) -> tuple[list[str], list[str]]:
    """Keys and values, and the last layers of feed-forward parts."""
    _, feed_forward = block_outputs(base)
    keys = [n for n, _, _ in numbers(base) if n.rpartition(".")[2] in ("key", "value", "k_proj", "v_proj")]
    return keys, feed_forward


def _ia3(base: Base, options: Options) -> nn.Module:
    from peft import IA3Config

    keys, feed_forward = ia3_layers(base)
    return _wrap(base, IA3Config, target_modules=[*keys, *feed_forward], feedforward_modules=feed_forward)


def _ia3_count(base: Base, options: Options) -> int:
    shapes = {name: (outputs, inputs) for name, outputs, inputs in numbers(base)}
    keys, feed_forward = ia3_layers(base)
    return sum(shapes[name][0] for name in keys) + sum(shapes[name][1] for name in feed_forward)


def _prompt(base: Base, options: Options) -> nn.Module:
    from peft import PromptTuningConfig, get_peft_model

    if base.task_type is None:
        raise UnsupportedError(f"prompt tuning needs token embeddings; {type(base.model).__name__} has no text input.")
    config = PromptTuningConfig(task_type=base.task_type, num_virtual_tokens=options["length"])
    model: nn.Module = get_peft_model(base.model, config)  # type: ignore[arg-type]
    return model


def _per_layer(entries: Callable[[int, int, Options], int]) -> Callable[[Base, Options], int]:
    """Sum of ``entries(outputs, inputs, options)`` over the target layers."""
    return lambda base, options: sum(entries(rows, columns, options) for _, rows, columns in numbers(base))


def _lokr(rows: int, columns: int, options: Options) -> int:
    from peft.tuners.lokr.layer import factorization

    (a, b), (c, d), r = factorization(rows, -1), factorization(columns, -1), options["r"]
    second = b * d if r >= max(b, d) / 2 else r * (b + d)
    return int(a * c + second)


def _lily(base: Base, options: Options) -> nn.Module:
    """PEFT shares B over the layers that one entry of its list of targets matches, so these are last parts of names."""
    from peft import LilyConfig

    kinds = sorted({name.rpartition(".")[2] for name, _, _ in numbers(base)})
    heads = "|".join(f"{re.escape(name)}($|[.])" for name in base.head)
    return _wrap(base, LilyConfig, target_modules=kinds, exclude_modules=f"({heads}).*" if heads else None, **options)


def _lily_count(base: Base, options: Options) -> int:
    """One A per layer, and one B and a router for each kind of layer; A goes with inputs, B with outputs."""
    kinds: dict[tuple[str, int, int], int] = {}
    for name, rows, columns in numbers(base):
        key = (name.rpartition(".")[2], rows, columns)
        kinds[key] = kinds.get(key, 0) + 1
    r, number = options["r"], options["num_B"]
    layers: int = sum(count * (columns * r + r * number) for (_, _, columns), count in kinds.items())
    return layers + int(sum(rows * number * r for _, rows, _ in kinds))


_low_rank = _per_layer(lambda rows, columns, o: o["r"] * (rows + columns))

METHODS = (
    Method(
        name="lora",
        title="LoRA",
        source="Hu et al. 2021 (arXiv 2106.09685), PEFT",
        formula="r * (outputs + inputs) per weight",
        build=_lora,
        count=_low_rank,
        options=_LOW_RANK,
        learning_rate=1e-3,
        saves="adapter",
    ),
    Method(
        name="dora",
        title="DoRA",
        source="Liu et al. 2024 (arXiv 2402.09353), PEFT",
        formula="r * (outputs + inputs) + outputs per weight",
        build=partial(_lora, use_dora=True),
        count=_per_layer(lambda rows, columns, o: o["r"] * (rows + columns) + rows),
        options=_LOW_RANK,
        learning_rate=1e-3,
        saves="adapter",
    ),
    Method(
        name="rslora",
        title="rsLoRA",
        source="Kalajdzievski 2023 (arXiv 2312.03732), PEFT",
        formula="r * (outputs + inputs) per weight",
        build=partial(_lora, use_rslora=True),
        count=_low_rank,
        options=_LOW_RANK,
        learning_rate=5e-4,
        saves="adapter",
    ),
    Method(
        name="pissa",
        title="PiSSA",
        source="Meng et al. 2024 (arXiv 2404.02948), PEFT",
        formula="r * (outputs + inputs) per weight",
        build=partial(_lora, init_lora_weights="pissa"),
        count=_low_rank,
        differs="alpha = r, as PiSSA's residual needs; the rounding of W - AB is in the base, so merging is not exact",
        options={"r": 8, "alpha": 8, "dropout": 0.0},
        learning_rate=5e-4,
        saves="adapter",
    ),
    Method(
        name="lora_fa",
        title="LoRA-FA",
        source="Zhang et al. 2023 (arXiv 2308.03303), PEFT's optimizer",
        formula="r * outputs per weight (A stays as drawn)",
        build=_lora_fa,
        count=_per_layer(lambda rows, columns, o: o["r"] * rows),
        options=_LOW_RANK,
        learning_rate=1e-3,
        saves="adapter",
        optimizer=_lora_fa_optimizer,
    ),
    Method(
        name="lora_plus",
        title="LoRA+",
        source="Hayou et al. 2024 (arXiv 2402.12354), PEFT's LoRA with its own rate for B",
        formula="r * (outputs + inputs) per weight",
        build=_lora,
        count=_low_rank,
        options={**_LOW_RANK, "ratio": 16.0},
        learning_rate=2e-4,
        saves="adapter",
        groups=lambda name, options: options["ratio"] if "lora_B" in name else 1.0,
    ),
    Method(
        name="adalora",
        title="AdaLoRA",
        source="Zhang et al. 2023 (arXiv 2303.10512), PEFT",
        formula="r * (outputs + inputs + 1) per weight, r the initial rank",
        build=_adalora,
        count=_per_layer(lambda rows, columns, o: o["r"] * (rows + columns + 1)),
        differs="warm-up of a tenth, final ranks in the last half of the steps",
        options={"r": 12, "target_r": 8, "alpha": 16, "dropout": 0.0, "orth_reg_weight": 0.1},
        learning_rate=2e-3,
        saves="adapter",
        after_step=_adalora_step,
    ),
    Method(
        name="vera",
        title="VeRA",
        source="Kopiczko et al. 2023 (arXiv 2310.11454), PEFT",
        formula="outputs + r per weight",
        build=_named("VeraConfig", vera_dropout=0.0, seeded="projection_prng_key"),
        count=_per_layer(lambda rows, columns, o: rows + o["r"]),
        options={"r": 256, "d_initial": 0.1},
        learning_rate=1e-2,
        saves="adapter",
    ),
    Method(
        name="loha",
        title="LoHa",
        source="Hyeon-Woo et al. 2021 (arXiv 2108.06098), PEFT",
        formula="2 r * (outputs + inputs) per weight",
        build=_named("LoHaConfig"),
        count=_per_layer(lambda rows, columns, o: 2 * o["r"] * (rows + columns)),
        options={"r": 4, "alpha": 8},
        learning_rate=2e-3,
        saves="adapter",
    ),
    Method(
        name="lokr",
        title="LoKr",
        source="Edalati et al. 2022, KronA (arXiv 2212.10650); Yeh et al. 2023 (arXiv 2309.14859), PEFT",
        formula="a c + min(b d, r * (b + d)) per weight, with outputs = a b and inputs = c d",
        build=_named("LoKrConfig"),
        count=_per_layer(_lokr),
        options={"r": 16, "alpha": 16},
        learning_rate=2e-3,
        saves="adapter",
    ),
    Method(
        name="ia3",
        title="(IA)³",
        source="Liu et al. 2022 (arXiv 2205.05638), PEFT",
        formula="outputs of keys and values, inputs of the feed-forward parts' last layers",
        build=_ia3,
        count=_ia3_count,
        learning_rate=1e-2,
        saves="adapter",
    ),
    Method(
        name="hra",
        title="HRA",
        source="Yuan et al. 2024 (arXiv 2405.17484), PEFT",
        formula="r * inputs per weight",
        build=_named("HRAConfig"),
        count=_per_layer(lambda rows, columns, o: o["r"] * columns),
        options={"r": 8},
        learning_rate=2e-3,
        saves="adapter",
    ),
    Method(
        name="miss",
        title="MiSS",
        source="Kang & Yin 2024 (arXiv 2409.15371; Bone is its earlier form), PEFT",
        formula="r * outputs per weight",
        build=_named("MissConfig", miss_dropout=0.0),
        count=_per_layer(lambda rows, columns, o: o["r"] * rows),
        options={"r": 8},
        learning_rate=1e-3,
        saves="adapter",
    ),
    Method(
        name="shira",
        title="SHiRA",
        source="Bhardwaj et al. 2024 (arXiv 2406.13175), PEFT",
        formula="r * (outputs + inputs) single entries per weight",
        build=_named("ShiraConfig", seeded="random_seed"),
        count=_low_rank,
        differs="random mask, one of the five of its paper",
        options={"r": 8},
        learning_rate=3e-3,
        saves="adapter",
    ),
    Method(
        name="oft",
        title="OFT",
        source="Qiu et al. 2023 (arXiv 2306.07280), PEFT",
        formula="inputs * (block - 1) / 2 per weight",
        build=_named("OFTConfig", module_dropout=0.0),
        count=_per_layer(lambda rows, columns, o: columns * (o["oft_block_size"] - 1) // 2),
        options={"oft_block_size": 32},
        learning_rate=1e-3,
        saves="adapter",
    ),
    Method(
        name="boft",
        title="BOFT",
        source="Liu et al. 2023 (arXiv 2311.06243), PEFT",
        formula="inputs * block + outputs per weight and butterfly factor",
        build=_named("BOFTConfig", boft_dropout=0.0),
        count=_per_layer(lambda rows, columns, o: o["boft_n_butterfly_factor"] * columns * o["boft_block_size"] + rows),
        options={"boft_block_size": 4, "boft_n_butterfly_factor": 1},
        learning_rate=1e-3,
        saves="adapter",
    ),
    Method(
        name="prompt",
        title="Prompt tuning",
        source="Lester et al. 2021 (arXiv 2104.08691), PEFT",
        formula="length * width of the embeddings",
        build=_prompt,
        count=lambda base, o: o["length"] * base.model.get_input_embeddings().weight.shape[1],  # type: ignore[operator]
        options={"length": 20},
        learning_rate=1e-2,
        saves="adapter",
        starts_at_base=False,
        merges=False,
    ),
    Method(
        name="lily",
        title="Lily",
        source="Zhong et al. 2024 (arXiv 2407.09946), PEFT",
        formula="r * (inputs + B) per weight, B r * outputs per kind of weight",
        build=_lily,
        count=_lily_count,
        options={"r": 16, "num_B": 2},
        learning_rate=1e-3,
        saves="adapter",
        merges=False,
    ),
    Method(
        name="hira",
        title="HiRA",
        source="Huang et al. 2025 (ICLR 2025), PEFT",
        formula="r * (outputs + inputs) per weight",
        build=_named("HiraConfig", hira_dropout=0.0),
        count=_low_rank,
        options={"r": 16},
        learning_rate=3e-3,
        saves="adapter",
    ),
    Method(
        name="supertuning",
        title="Super-Tuning",
        source="arXiv 2607.09287, PEFT",
        formula="(1 - sparsity) of the entries of each weight, the largest ones",
        build=_named("SupertuningConfig"),
        count=_per_layer(lambda rows, columns, o: int(rows * columns * (1 - o["sparsity"]))),
        options={"sparsity": 0.99},
        learning_rate=1e-3,
        saves="adapter",
    ),
)
