"""Pictures and videos: RandAugment, frames of clips, folders of classes."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from cli_helpers import SHARED, recipe, save_images, save_vit, write_rows
from slicefine.errors import ConfigError, DataError
from slicefine.tasks import Columns, DataSettings, ModelSettings, TaskSettings, get_task
from slicefine.tasks.augment import OPERATIONS, RandAugment
from slicefine.tasks.sources import load_splits
from slicefine.tasks.video import frame_indices, read_frames
from slicefine.training.evaluate import evaluate
from slicefine.training.run import train

pytestmark = pytest.mark.filterwarnings(  # PEFT asks for it
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
CLIPS = SHARED / "data" / "video_clips"
CALTECH = SHARED / "data" / "caltech101"
real_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside the repository")
STRENGTH = 9 / 30  # RandAugment's default


def noise(width: int = 20, height: int = 16) -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# -- RandAugment --------------------------------------------------------------------------------------------------


def test_operations_are_those_of_randaugment():
    """Name by name, as the article and torchvision list them."""
    assert sorted(OPERATIONS) == [
        "autocontrast",
        "brightness",
        "color",
        "contrast",
        "equalize",
        "identity",
        "posterize",
        "rotate",
        "sharpness",
        "shear_x",
        "shear_y",
        "shift_x",
        "shift_y",
        "solarize",
    ]


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("strength", [-STRENGTH, STRENGTH, 1.0])
def test_operations_keep_size_and_mode_and_leave_their_input(name: str, strength: float):
    picture = noise()
    before = np.asarray(picture).copy()
    changed = OPERATIONS[name](picture, strength)
    assert (changed.size, changed.mode) == (picture.size, "RGB")
    assert np.array_equal(np.asarray(picture), before)
    if name == "identity":
        assert np.array_equal(np.asarray(changed), before)
    elif name not in ("autocontrast", "equalize"):
        assert not np.array_equal(np.asarray(changed), before)


def test_pixels_are_changed_by_the_known_formulas():
    picture = noise()
    pixels = np.asarray(picture).astype(float)

    def changed(name: str, strength: float = STRENGTH) -> Any:
        return np.asarray(OPERATIONS[name](picture, strength)).astype(float)

    assert np.array_equal(changed("solarize"), np.where(pixels < 178, pixels, 255 - pixels))  # 255 (1 - 0.3)
    assert np.array_equal(changed("solarize", -STRENGTH), changed("solarize"))
    assert np.array_equal(changed("posterize"), pixels - pixels % 2)  # 7 bits
    assert np.array_equal(changed("posterize", 1.0), pixels - pixels % 16)  # 4 bits
    assert np.abs(changed("brightness") - np.clip(1.27 * pixels, 0, 255)).max() <= 1
    assert np.abs(changed("brightness", -STRENGTH) - 0.73 * pixels).max() <= 1
    columns = int(150 / 331 * 20 * STRENGTH)
    assert columns == 2
    assert np.array_equal(changed("shift_x")[:, :-columns], pixels[:, columns:])
    assert not changed("shift_x")[:, -columns:].any()
    assert np.array_equal(changed("shift_y", -STRENGTH)[2:], pixels[:-2])
    sheared, twin = changed("shear_x"), np.zeros_like(pixels)
    for y in range(16):
        for x in range(20):
            source = int(np.floor((x + 0.5) + 0.09 * (y + 0.5)))
            twin[y, x] = pixels[y, source] if source < 20 else 0
    assert np.array_equal(sheared, twin)
    turned = np.asarray(OPERATIONS["rotate"](Image.fromarray(np.eye(21, dtype=np.uint8) * 255), 1.0))
    assert turned[10, 10] == 255  # the centre stays


def test_a_seed_decides_and_all_operations_are_drawn(monkeypatch: pytest.MonkeyPatch):
    drawn: list[tuple[str, float]] = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda picture, s, name=name: drawn.append((name, s)) or picture)
    change = RandAugment()
    for seed in range(2):
        torch.manual_seed(0)
        for _ in range(700):
            change([noise()])
        if seed == 0:
            first = list(drawn)
            drawn.clear()
    assert drawn == first
    assert len(drawn) == 1400
    counts = {name: sum(one == name for one, _ in drawn) for name in OPERATIONS}
    assert min(counts.values()) > 60  # 100 expected
    assert max(counts.values()) < 140
    assert {round(s, 6) for _, s in drawn} == {0.3, -0.3}
    assert 600 < sum(s > 0 for _, s in drawn) < 800


def test_pictures_of_one_call_are_changed_alike():
    torch.manual_seed(5)
    for _ in range(20):
        one, two = RandAugment(operations=3)([noise(), noise()])
        assert np.array_equal(np.asarray(one), np.asarray(two))


def images(model: str, data: str, **task: Any) -> Any:
    return get_task(TaskSettings("image-classification", **task), ModelSettings(model), DataSettings(data))


def batch_of(prepared: Any, split: str, count: int = 8) -> torch.Tensor:
    torch.manual_seed(0)
    return prepared.collator([prepared.splits[split][i] for i in range(count)])["pixel_values"]


@pytest.fixture
def red_and_blue(tmp_path: Path) -> tuple[str, dict[str, Any]]:
    data = save_images(tmp_path / "data")
    return data, load_splits(DataSettings(data, validation_fraction=0))


def test_only_the_train_set_is_augmented_and_an_evaluation_nowhere(tmp_path: Path, red_and_blue: Any):
    data, splits = red_and_blue
    model = save_vit(tmp_path / "vit")
    plain, changing = images(model, data), images(model, data, augment="randaugment")
    for task in (plain, changing):
        task.read(splits)
    loaded = plain.load()
    before, after = plain.prepare(splits, loaded), changing.prepare(splits, loaded)
    assert torch.equal(batch_of(before, "test"), batch_of(after, "test"))
    assert not torch.equal(batch_of(before, "train"), batch_of(after, "train"))
    assert torch.equal(batch_of(after, "train"), batch_of(after, "train"))  # the same seed
    changing.restore(plain.state())
    assert torch.equal(batch_of(before, "train"), batch_of(changing.prepare(splits, loaded), "train"))


def test_an_unknown_augmentation_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"task.augment='mixup' is unknown; expected one of none, randaugment"):
        TaskSettings(augment="mixup")


@pytest.mark.skipif(not CALTECH.is_dir(), reason="the real pictures are not beside the repository")
def test_real_pictures_are_augmented(tmp_path: Path):
    model = save_vit(tmp_path / "vit")
    settings = DataSettings(str(CALTECH), limit_train=24, limit_test=8, validation_fraction=0)
    task = get_task(TaskSettings("image-classification", augment="randaugment"), ModelSettings(model), settings)
    splits = load_splits(settings, check=task.read)
    prepared = task.prepare(splits, task.load())
    pixels = batch_of(prepared, "train", 24)
    assert pixels.shape == (24, 3, 16, 16)
    assert len(task.labels) == 101
    assert bool(pixels.isfinite().all())


# -- videos -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "count", "stride", "expected"),
    [
        (300, 16, 4, list(range(119, 180, 4))),  # 61 frames around the middle of 300
        (61, 16, 4, list(range(0, 61, 4))),
        (32, 16, 4, [0, 4, 8, 12, 16, 20, 24, 28, *[31] * 8]),
        (1, 3, 4, [0, 0, 0]),
    ],
)
def test_frames_are_taken_around_the_middle(length: int, count: int, stride: int, expected: list[int]):
    assert frame_indices(length, count, stride, drawn=False) == expected


def test_drawn_frames_keep_their_distance_and_reach_both_ends():
    starts = set()
    for _ in range(400):
        found = frame_indices(70, 16, 4, drawn=True)
        assert {b - a for a, b in pairwise(found)} == {4}
        starts.add(found[0])
    assert starts == set(range(10))  # the last one ends at frame 69


def save_clip(path: Path, colour: int, frames: int = 12) -> None:
    """Grey frames, each a bit brighter than the one before, without loss."""
    av = pytest.importorskip("av", reason="the extra video is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "bgr0"
        for i in range(frames):
            pixels = np.zeros((16, 24, 3), dtype=np.uint8)
            pixels[..., colour] = 20 * i
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_the_frames_that_were_chosen_are_read(tmp_path: Path):
    save_clip(tmp_path / "clip.mkv", 0)
    found = read_frames(tmp_path / "clip.mkv", 4, 2, drawn=False)
    assert [int(np.asarray(frame)[0, 0, 0]) // 20 for frame in found] == [2, 4, 6, 8]
    short = read_frames(tmp_path / "clip.mkv", 4, 5, drawn=False)
    assert [int(np.asarray(frame)[0, 0, 0]) // 20 for frame in short] == [0, 5, 10, 11]


@real_clips
def test_every_real_clip_is_read(tmp_path: Path):
    pytest.importorskip("av", reason="the extra video is not installed")
    files = sorted(CLIPS.iterdir())
    assert len(files) == 5
    for file in files:
        frames = read_frames(file, 16, 4, drawn=False)
        assert len(frames) == 16
        assert {frame.mode for frame in frames} == {"RGB"}
        assert not np.array_equal(np.asarray(frames[0]), np.asarray(frames[7]))


def test_what_is_no_video_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("av", reason="the extra video is not installed")
    (tmp_path / "clip.mp4").write_text("no video")
    with pytest.raises(DataError, match=r"clip.mp4: cannot be decoded as a video \(.*\). Drop the clip, or convert it"):
        read_frames(tmp_path / "clip.mp4", 4, 1, drawn=False)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r'PyAV, which is not installed; run: pip install "slicefine\[video\]"'):
        read_frames(tmp_path / "clip.mp4", 4, 1, drawn=False)


def save_videomae(folder: Path, frames: int = 4) -> str:
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=frames,
        tubelet_size=2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    return str(folder)


def save_clips(folder: Path, each: int = 8) -> str:
    for i in range(each):
        for colour, name in enumerate(("red", "green")):
            save_clip(folder / "train" / name / f"{i}.mkv", colour, frames=6 + i)
    for colour, name in enumerate(("red", "green")):
        save_clip(folder / "test" / name / "0.mkv", colour)
    return str(folder)


def videos(model: str, data: str, **task: Any) -> Any:
    return get_task(TaskSettings("video-classification", **task), ModelSettings(model), DataSettings(data))


def test_folders_of_classes_and_tables_give_the_same(tmp_path: Path):
    data = save_clips(tmp_path / "clips", 2)
    splits = load_splits(DataSettings(data, validation_fraction=0))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4, "test": 2}
    assert splits["train"][1] == {"video": "train/green/1.mkv", "label": "green"}
    for name, rows in splits.items():
        rows.to_csv(tmp_path / "clips" / f"{name}.csv")
    again = load_splits(DataSettings(data, validation_fraction=0))
    assert {name: rows.to_list() for name, rows in again.items()} == {n: r.to_list() for n, r in splits.items()}
    whole = load_splits(DataSettings(f"{data}/train", validation_fraction=0))
    assert list(whole) == ["train"]
    assert whole["train"]["label"] == ["green", "green", "red", "red"]
    chosen = load_splits(DataSettings(f"{data}/..", train="clips/train", validation_fraction=0))
    assert chosen["train"]["video"][0] == "clips/train/green/0.mkv"


def save_pictures(folder: Path, each: int = 8) -> str:
    """Red pictures and blue ones, one folder per class."""
    for name, colour in {"red": (200, 20, 20), "blue": (20, 20, 200)}.items():
        for split, number in {"train": each, "test": 2}.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (20 + i, 16), colour).save(folder / split / name / f"{i}.png")
    return str(folder)


def test_pictures_in_folders_of_classes_are_learnt_and_evaluated(tmp_path: Path):
    data = Path(save_pictures(tmp_path / "pictures"))
    for stray in ("train/red/notes.txt", "train/.thumbnails/0.png", "train/red/._0.png"):
        (data / stray).parent.mkdir(exist_ok=True)
        (data / stray).write_text("no picture")
    splits = load_splits(DataSettings(str(data), validation_fraction=0))
    assert {name: rows["label"] for name, rows in splits.items()} == {
        "train": ["blue"] * 8 + ["red"] * 8,
        "test": ["blue"] * 2 + ["red"] * 2,
    }
    assert splits["train"][9]["image"].size == (21, 16)
    settings = recipe(save_vit(tmp_path / "model"), str(data), tmp_path / "run", task__name="image-classification")
    settings.training.learning_rate, settings.training.epochs = 1e-2, 6
    report = train(settings)
    assert report["after"]["test"]["accuracy"] == 1.0
    assert evaluate(str(tmp_path / "run"), split="test")["accuracy"] == 1.0


def test_pictures_that_cannot_be_used_are_refused(tmp_path: Path):
    data = Path(save_pictures(tmp_path / "pictures", 4))
    (data / "train" / "red" / "1.png").write_bytes(b"no picture")
    settings = recipe(save_vit(tmp_path / "model"), str(data), tmp_path / "run", task__name="image-classification")
    with pytest.raises(DataError, match=r"pictures/train/red/1.png cannot be read as a picture.*Replace or remove it"):
        train(settings)
    whole = (data / "train" / "red" / "0.png").read_bytes()
    (data / "train" / "red" / "1.png").write_bytes(whole[: len(whole) // 2])  # its first bytes are a picture's
    with pytest.raises(DataError, match=r"1.png cannot be read as a picture: .*truncated.*Replace or remove it"):
        train(settings)
    (data / "train" / "red" / "1.mp4").touch()
    with pytest.raises(DataError, match=r"pictures \(train/blue/0.png\) and videos \(train/red/1.mp4\) in folders"):
        load_splits(settings.data)


def test_clips_become_batches_drawn_in_training_only(tmp_path: Path):
    model, data = save_videomae(tmp_path / "model"), save_clips(tmp_path / "clips", 3)
    task = videos(model, data, stride=1)
    splits = load_splits(DataSettings(data, validation_fraction=0), check=task.read)
    loaded = task.load()
    prepared = task.prepare(splits, loaded)
    assert loaded.new_modules == ["fc_norm", "classifier"] or "classifier" in loaded.new_modules
    pixels = batch_of(prepared, "test", 2)
    assert pixels.shape == (2, 4, 3, 16, 16)  # clips, frames, colours, height, width
    level = (pixels[0, :, 1, 0, 0] + 1) / 2 * 255 / 20  # the green clip; brightness tells the frame
    assert level.round().tolist() == [4, 5, 6, 7]
    starts = {round(float((prepared.splits["train"][2]["pixel_values"][0, 1, 0, 0] + 1) * 255 / 40)) for _ in range(60)}
    assert starts == set(range(5))  # 8 frames
    task.restore(task.state())
    calm = task.prepare(splits, loaded).splits["train"]
    assert len({float(calm[2]["pixel_values"][0, 1, 0, 0]) for _ in range(20)}) == 1


@real_clips
def test_real_clips_are_classified(tmp_path: Path):
    pytest.importorskip("av", reason="the extra video is not installed")
    for name, files in {"a": ["demo.mp4", "test.avi"], "b": ["part_0.mp4", "demo_spatiotemporal_det.mp4"]}.items():
        (tmp_path / "clips" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "clips" / name / file).symlink_to(CLIPS / file)
    data = str(tmp_path / "clips")
    task = videos(save_videomae(tmp_path / "model", frames=16), data, augment="randaugment")
    splits = load_splits(DataSettings(data, validation_fraction=0), check=task.read)
    loaded = task.load()
    prepared = task.prepare(splits, loaded)
    batch = prepared.collator([prepared.splits["train"][i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 16, 3, 16, 16)
    output = loaded.model(**batch)
    output.loss.backward()
    assert output.logits.shape == (4, 2)
    assert bool(output.loss.isfinite())


def test_videos_are_learnt_and_evaluated(tmp_path: Path):
    data = save_clips(tmp_path / "clips")
    settings = recipe(save_videomae(tmp_path / "model"), data, tmp_path / "run", task__name="video-classification")
    settings.task.stride, settings.data.validation_fraction = 1, 0.2
    settings.training.learning_rate, settings.training.epochs, settings.training.batch_size = 1e-2, 8, 4
    report = train(settings)
    assert report["after"]["test"]["accuracy"] == 1.0
    assert report["reload_identical"] is True
    assert evaluate(str(tmp_path / "run"), split="test")["accuracy"] == 1.0


def test_videos_that_cannot_be_used_are_refused(tmp_path: Path):
    model, data = save_videomae(tmp_path / "model"), save_clips(tmp_path / "clips", 1)
    task = videos(model, data, frames=8)
    splits = load_splits(DataSettings(data, validation_fraction=0), check=task.read)
    with pytest.raises(
        ConfigError, match=r"task.frames=8: the model's positions are for 4 frames; leave task.frames out"
    ):
        task.prepare(splits, task.load())
    with pytest.raises(ConfigError, match=r"task.frames=None and task.stride=0 must be at least 1"):
        TaskSettings("video-classification", stride=0)
    with pytest.raises(
        DataError, match=r"train set, row 0: no such file: .*gone.mp4. Correct column 'video'; its paths"
    ):
        videos(model, data).read({"train": Dataset.from_list([{"video": "gone.mp4", "label": "a"}])})
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"in the folder, and no pictures or videos in folders of classes. Name the files with data"
    ):
        load_splits(DataSettings(str(tmp_path / "empty")))


def test_a_table_of_one_file_names_clips_beside_it(tmp_path: Path):
    model, data = save_videomae(tmp_path / "model"), Path(save_clips(tmp_path / "clips", 1))
    rows = [{"file": "train/red/0.mkv", "label": "red"}, {"file": "train/green/0.mkv", "label": "green"}]
    write_rows(data / "list.jsonl", rows)
    settings = DataSettings(str(data / "list.jsonl"), columns=Columns(video="file"), validation_fraction=0)
    task = get_task(TaskSettings("video-classification", stride=1), ModelSettings(model), settings)
    splits = load_splits(settings, check=task.read)
    assert task.prepare(splits, task.load()).splits["train"][0]["pixel_values"].shape == (4, 3, 16, 16)
