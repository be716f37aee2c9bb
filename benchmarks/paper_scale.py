"""The recipes of the paper's tables at scale `paper`, on random weights of the paper's shapes and made-up data: do they
fit, and do they run?

Each family goes through the whole of `slicefine train` with its table's settings (task, batch, precision, schedule):
data read from files, tokeniser or decoder, Trainer, moves, saving. What is replaced: weights by random ones (no
download), data by made-up rows in the recipe's columns, the number of steps, and the interval of moves, so that a short
run moves.

    python benchmarks/paper_scale.py --out benchmarks/results/paper_scale.json    # all of them: a GPU
    python benchmarks/paper_scale.py --families roberta-base vit-base --words 40 --batch 4 --out cpu.json
    python benchmarks/paper_scale.py --families llama-3.2-3b --methods SliceFine-5C --accumulate 1 --out cpu.json
    python benchmarks/paper_scale.py --families videomae-base --batch 1 --clips CLIPS --out video.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slicefine.errors import ConfigError, SliceFineError
from slicefine.sweeps.paper import find_recipe, read_table
from slicefine.sweeps.settings import merged, train_settings
from slicefine.training.report import environment
from slicefine.training.run import train
from slicefine.training.screen import quiet_libraries

METHODS = ("SliceFine-5C", "SliceFine-5RC", "LoRA")
WORDS = [a + b + c for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en") for c in "bdgklmnprstz"]
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}


@dataclass(frozen=True)
class Family:
    """A model of the paper: its table, the task that stands for it, and its configuration as published with it."""

    table: str
    task: str
    config: dict[str, Any]


def sizes(width: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip(names, (width, inner, layers, heads), strict=True)), **more}


ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "pad_token_id": 1}
VISION = sizes(768, 3072, 12, 12, image_size=224)
FAMILIES = {
    "roberta-base": Family("table7", "cola", ROBERTA | sizes(768, 3072, 12, 12)),
    "roberta-large": Family("table6", "cola", ROBERTA | sizes(1024, 4096, 24, 16)),
    "vit-base": Family("table2", "caltech101", {"model_type": "vit", "patch_size": 16, **VISION}),
    "videomae-base": Family("table2", "ucf101", {"model_type": "videomae", "num_frames": 16, **VISION}),
    "llama-3.2-3b": Family(
        "table1",
        "commonsense",
        LLAMA | sizes(3072, 8192, 28, 24, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
    ),
    "llama-2-7b": Family("table9", "commonsense", LLAMA | sizes(4096, 11008, 32, 32, vocab_size=32000)),
    "deepseek-r1-8b": Family(
        "table5_deepseek",
        "commonsense",
        LLAMA | sizes(4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256),
    ),
    "gemma-3-12b": Family(
        "table5_gemma",
        "commonsense",
        sizes(3840, 15360, 48, 16, num_key_value_heads=8, head_dim=256, vocab_size=262208, model_type="gemma3_text"),
    ),
}


def main() -> None:
    args = arguments()
    quiet_libraries()
    given = vars(args) | {"out": Path(args.out).name, "clips": args.clips and args.clips.name}
    results: list[dict[str, Any]] = []
    for name in args.families:
        family = FAMILIES[name]
        with tempfile.TemporaryDirectory(prefix="paper-scale-") as scratch:
            for method in args.methods:
                row = {"family": name, "table": family.table, "task": family.task, "method": method}
                try:
                    row |= run(family, method, Path(scratch), args)
                except (SliceFineError, RuntimeError, ValueError) as error:  # memory, too
                    row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                results.append(row)
                record = {"arguments": given, **environment(), "results": results}
                Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
                print(json.dumps({key: value for key, value in row.items() if key != "recipe"}), flush=True)


def run(family: Family, method: str, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run of the recipe; the made-up data is written on the first call."""
    recipe = recipe_of(family, method)
    data = scratch / "data"
    if not data.is_dir():
        data.mkdir()
        write_data(recipe, data, args)
        write_base(family, recipe, scratch / "base", args.smoke)
    changes = {
        "model.path": str(scratch / "base"),
        "data.path": str(data),
        **dict.fromkeys(("data.name", "data.validation", "data.test", "data.limit_validation", "data.limit_test")),
        "data.validation_fraction": 0.2,
        "task.tests": {},
        "slice.moves": None,
        "slice.interval": max(1, args.steps // 4),
        "training.max_steps": args.steps,
        "training.logging_steps": 1,
        "training.evaluate": "no",
        "training.evaluate_before": False,
        "training.load_best": False,
    }
    if args.accumulate is not None:
        changes["training.gradient_accumulation"] = args.accumulate
    if args.batch is not None:
        changes["training.batch_size"] = args.batch
    own = {"output": str(scratch / "run"), "overwrite": True, "quiet": True, "verify": False}
    recipe = merged(recipe, {**changes, **own})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    report = train(train_settings(recipe))
    losses = [entry["loss"] for entry in report["history"] if "loss" in entry]
    wanted = ("counts", "moves", "steps", "seconds_per_step", "peak_memory_bytes", "peak_memory_kind", "file_bytes")
    shown = merged(recipe, {"model.path": "random weights", "data.path": "made up", "output": None})
    return {key: report[key] for key in wanted} | {"first_loss": losses[0], "last_loss": losses[-1], "recipe": shown}


def recipe_of(family: Family, method: str) -> dict[str, Any]:
    """The table's settings at scale `paper` for a task and a method, as `slicefine reproduce` makes them."""
    table = read_table(find_recipe(family.table), "paper").settings
    every = read_table(find_recipe("table7"), "paper").settings.vary["method"]  # methods that this table may lack
    if method not in every | table.vary["method"]:
        raise ConfigError(f"{method!r} is in neither {family.table} nor table7; methods are named as in methods.yaml.")
    chosen = (every | table.vary["method"])[method]
    return merged(table.base, {**chosen, **table.vary["task"][family.task]})  # the task comes last, as in a sweep


def shrunk(config: dict[str, Any], smoke: bool) -> dict[str, Any]:
    """The configuration, or a tiny one of the same kind for a smoke test."""
    if not smoke:
        return config
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2} if "num_key_value_heads" in config else {}
    small |= {"head_dim": 16} if "head_dim" in config else {}
    small |= {"image_size": 32} if "image_size" in config else {}
    small |= {"vocab_size": 2000} if "vocab_size" in config else {}
    return config | small


def write_base(family: Family, recipe: dict[str, Any], folder: Path, smoke: bool) -> None:
    """A random model in the recipe's precision, with its tokeniser or image processor."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, VideoMAEImageProcessor, ViTImageProcessor

    given = shrunk(family.config, smoke)
    kind = recipe.get("task", {}).get("name", "text-classification")
    auto = AutoModelForCausalLM if kind == "reasoning" else AutoModel
    config = AutoConfig.for_model(given["model_type"], **{k: v for k, v in given.items() if k != "model_type"})
    torch.manual_seed(0)
    auto.from_config(config, dtype=recipe["model"].get("dtype", "float32")).save_pretrained(folder)
    if "image_size" in given:
        side = given["image_size"]
        processor = VideoMAEImageProcessor if kind == "video-classification" else ViTImageProcessor
        size = {"shortest_edge": side} if kind == "video-classification" else {"height": side, "width": side}
        processor(size=size, crop_size={"height": side, "width": side}).save_pretrained(folder)
    else:
        write_tokenizer(folder)


def write_data(recipe: dict[str, Any], folder: Path, args: argparse.Namespace) -> None:
    """Rows in the recipe's columns; what is to be learnt is in the first word, colour or frame."""
    draw, columns = random.Random(0), recipe["data"].get("columns", {})
    kind = recipe.get("task", {}).get("name", "text-classification")
    if kind == "video-classification":
        write_videos(folder, args)
    elif kind == "image-classification":
        write_images(folder, columns, args)
    else:
        rows = [text_row(draw, kind, columns, args.words) for _ in range(args.rows)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def text_row(draw: random.Random, kind: str, columns: dict[str, str], words: int) -> dict[str, Any]:
    text = " ".join(draw.choices(WORDS, k=words))
    if kind == "reasoning":
        return {columns["prompt"]: text, columns["answer"]: f"the correct answer is {text.split()[0]}"}
    return {columns["text"]: text, "label": int(text < "m")}


def write_images(folder: Path, columns: dict[str, str], args: argparse.Namespace) -> None:
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pictures

    image, label = columns.get("image", "image"), columns.get("label", "label")
    draw = np.random.default_rng(0)
    rows = []
    for number in range(args.rows):
        pixels = draw.integers(0, 255, (args.pixels, args.pixels, 3), dtype=np.uint8)
        pixels[..., number % 3] //= 2
        rows.append({image: Pictures.fromarray(pixels), label: number % 3})
    features = Features({image: Image(), label: ClassLabel(names=["a", "b", "c"])})
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")


def write_videos(folder: Path, args: argparse.Namespace) -> None:
    if args.clips is not None:  # real ones, in two classes
        for number, clip in enumerate(sorted(path for path in args.clips.iterdir() if path.suffix in (".mp4", ".avi"))):
            place = folder / "train" / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / clip.name).symlink_to(clip.resolve())
        return
    import av
    import numpy as np

    draw = np.random.default_rng(0)
    for number in range(min(args.rows, 24)):
        place = folder / "train" / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        with av.open(str(place / f"{number}.mp4"), "w") as clip:
            stream = clip.add_stream("mpeg4", rate=25)
            stream.width = stream.height = args.pixels
            for _ in range(64):
                pixels = draw.integers(0, 255, (args.pixels, args.pixels, 3), dtype=np.uint8)
                pixels[..., number % 3] //= 2
                clip.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            clip.mux(stream.encode())


def write_tokenizer(folder: Path) -> None:
    """One token per word: only the number of tokens matters to time and memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    known = {word: number for number, word in enumerate([*special, *WORDS, "the", "correct", "answer", "is"])}
    raw = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=8192, **names).save_pretrained(folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file for the results")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="names of recipes/paper/methods.yaml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=800, help="made-up rows (videos: at most 24)")
    parser.add_argument("--words", type=int, default=200, help="words of a text, one token each")
    parser.add_argument("--pixels", type=int, default=240, help="side of a picture or frame in its file")
    parser.add_argument("--clips", type=Path, help="folder of real videos instead of made-up ones")
    parser.add_argument("--batch", type=int, help="instead of the recipe's")
    parser.add_argument("--accumulate", type=int, help="instead of the recipe's gradient accumulation")
    parser.add_argument("--smoke", action="store_true", help="tiny models of the same kinds")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="SliceFine")
    main()
