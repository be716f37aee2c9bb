"""Tiny models, tokenizers and data sets, built here: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from slicefine.training.settings import TrainSettings

GOOD, BAD = ["good", "fine", "great", "nice"], ["bad", "poor", "awful", "weak"]
WORDS = [*GOOD, *BAD, *["the", "film", "was", "very", "one", "two", "three", "plus", "is"]]
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def save_tokenizer(folder: Path, pair: bool) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if pair:
        single, double = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
        raw.post_processor = processors.TemplateProcessing(
            single=single, pair=double, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=32, **names).save_pretrained(folder)


def save_bert(folder: Path) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,  # random features that a head can use
        hidden_dropout_prob=0.02,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, pair=True)
    return str(folder)


def save_llama(folder: Path) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        eos_token_id=4,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, pair=False)
    return str(folder)


def save_vit(folder: Path) -> str:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


def review(number: int) -> dict[str, Any]:
    label = number % 2
    words = (GOOD, BAD)[label]
    return {"text": f"{words[number // 2 % 4]} film {'very ' * (number % 3)}", "label": label}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_reviews(folder: Path, rows: int = 64) -> str:
    write_rows(folder / "train.jsonl", [review(i) for i in range(rows)])
    write_rows(folder / "validation.jsonl", [review(i + 3) for i in range(16)])
    return str(folder)


def save_images(folder: Path) -> str:
    """Red pictures and blue ones."""
    colours = [(200, 20, 20), (20, 20, 200)]
    rows = [{"image": Pictures.new("RGB", (20, 16), colours[i % 2]), "label": i % 2} for i in range(32)]
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"])})
    folder.mkdir(parents=True)
    data = Dataset.from_list(rows, features=features)
    data.to_parquet(folder / "train.parquet")
    data.select(range(8)).to_parquet(folder / "test.parquet")
    return str(folder)


def recipe(model: str, data: str, output: Path | None, **changes: Any) -> TrainSettings:
    """Settings of a quick run; ``changes`` are dotted names with ``__`` for the dot."""
    settings = TrainSettings(quiet=True, output=None if output is None else str(output))
    settings.model.path, settings.data.path = model, data
    settings.training.epochs, settings.training.batch_size, settings.training.logging_steps = 2, 8, 1
    settings.slice.r, settings.slice.minimum_steps, settings.slice.moves = 2, 4, 3
    settings.slice.mode = "alternate"  # both kinds of slices
    for name, value in changes.items():
        *groups, last = name.split("__")
        target: Any = settings
        for group in groups:
            target = getattr(target, group)
        if not hasattr(target, last):
            raise AttributeError(name)
        setattr(target, last, value)
    return settings
