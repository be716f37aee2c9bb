"""The benchmark measures what it says: every method is correct first, rounds are interleaved, refusals have names."""

from __future__ import annotations

import gc
import json
import os
import platform
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from slicefine import functional
from slicefine.bench import measure
from slicefine.bench.methods import METHODS, SUITES, Method, find_method, methods_of
from slicefine.bench.settings import BenchSettings
from slicefine.bench.shapes import SHAPES, find_shape, make_batch, make_model, step_loss
from slicefine.bench.through_trainer import TrainerWorkload
from slicefine.bench.workload import BenchError, Workload, keep_freed_memory
from slicefine.cli.main import main
from slicefine.errors import ConfigError, UnsupportedError
from slicefine.mover import movers_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft"),  # what rivals say of their own settings
]

TINY = {
    "roberta": find_shape("roberta", layers=2, width=64, batch=2, length=8),
    "llama": find_shape("llama", layers=2, width=64, batch=2, length=8),
    "vit": replace(find_shape("vit-b16", layers=2, width=64, batch=2)),
    "videomae": replace(find_shape("videomae-base", layers=1, width=64, batch=1)),
}
CPU = torch.device("cpu")


def workload(name, shape, **options):
    base = make_model(shape)
    batch = make_batch(shape, CPU, torch.float32)
    expected, gradients = measure._expectations(base, batch)
    made = Workload(name, METHODS[name], base, shape.family, batch, **options)
    return made, expected, gradients


@pytest.mark.parametrize("family", ["roberta", "llama"])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_correct_and_steps(name, family):
    if (name, family) == ("bitfit", "llama"):
        with pytest.raises(UnsupportedError, match=r"bitfit trains biases, and a llama model has none"):
            workload(name, TINY[family])
        return
    made, expected, gradients = workload(name, TINY[family])
    made.check(expected, gradients)
    assert all(p.grad is None for p in made.trained)
    before = [p.detach().clone() for p in made.trained]
    assert min(made.step()) >= 0
    assert (made.trainable() > 0) is (not name.startswith("floor"))
    if before:
        assert any(not torch.equal(a, b) for a, b in zip(before, made.trained, strict=True))
        assert made.state_bytes() > 0


@pytest.mark.parametrize("mode", ["row", "column", "alternate"])
def test_slices_of_any_rank_after_any_moves(mode):
    name = f"{mode} r=7 after 3 moves"
    base = make_model(TINY["roberta"])
    batch = make_batch(TINY["roberta"], CPU, torch.float32)
    made = Workload(name, find_method(name), base, "roberta", batch)
    made.check(*measure._expectations(base, batch))
    (mover,) = movers_of(made.model)
    assert mover.visits == 4
    block = next(iter(mover.slices().values()))
    place = {"row": ("row", 21), "column": ("column", 21), "alternate": ("column", 7)}[mode]
    assert (block.axis, block.start, block.width) == (*place, 7)
    with pytest.raises(ConfigError, match=r"'row r=0' is unknown"):
        find_method("row r=0")


@pytest.mark.parametrize(
    ("layers", "halves", "thirds"),
    [
        (6, [[3, 4, 5], [0, 1, 2]], [[4, 5], [2, 3], [0, 1]]),
        (4, [[2, 3], [0, 1]], [[3], [1], [0]]),  # four windows of one block have two middles
        (2, [[1], [0]], [[1], [1], [0]]),
        (1, [[0], [0]], [[0], [0], [0]]),
    ],
)
def test_windows_stand_where_their_names_say(layers, halves, thirds):
    def blocks(name):
        base, batch = make_model(shape), make_batch(shape, CPU, torch.float32)
        made = Workload(name, find_method(name), base, "roberta", batch)
        (mover,) = movers_of(made.model)
        return sorted({int(layer.split(".")[-4 if "attention" in layer else -3]) for layer in mover.slices()})

    shape = find_shape("roberta", layers=layers, width=64, batch=1, length=8)
    assert [blocks(f"window 1/2{low}") for low in ("", " low")] == halves
    assert [blocks(f"window 1/3{place}") for place in ("", " middle", " low")] == thirds


def test_what_a_method_adds_to_a_model():
    sizes = {name: workload(name, TINY["roberta"])[0].added_bytes() for name in METHODS if "lora-fa" not in name}
    assert all(sizes[name] == 0 for name in ("floor", "bitfit", "full"))
    for name in ("lora r=8", "row r=5", "column r=32"):  # the copies that train, and nothing else
        assert sizes[name] == 4 * workload(name, TINY["roberta"])[0].trainable()
    assert sizes["vera"] > 4 * workload("vera", TINY["roberta"])[0].trainable()  # its frozen projections count


def test_a_method_without_memory_is_named_and_the_others_are_measured(monkeypatch):
    def hungry(model, family):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setitem(METHODS, "full", Method(hungry))
    settings = BenchSettings(models="llama", methods="full,column r=5", rounds=2, layers=1, width=64, length=8, batch=1)
    result = measure.measure_shape(settings, settings.shapes()[0])
    assert [row.method for row in result.rows] == ["floor", "floor again", "column r=5"]
    assert result.skipped == {"full": "out of memory (CUDA out of memory. Tried to allocate)"}
    monkeypatch.setitem(METHODS, "floor", Method(hungry))
    result = measure.measure_shape(settings, settings.shapes()[0])
    assert (result.rows, list(result.skipped)) == ([], ["full", "column r=5"])


def test_methods_that_do_not_fit_together_are_measured_apart(monkeypatch):
    held: list[str] = []

    def build(settings, name, *args):
        held.append(name)
        if len(held) > 4:  # two floors and two methods
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(settings, name, *args)

    real = measure._workload
    monkeypatch.setattr(measure, "_workload", build)
    monkeypatch.setattr(measure, "_release", lambda device: held.clear())
    names = ["column r=1", "column r=5", "row r=1", "row r=5"]
    settings = BenchSettings(models="llama", methods=names, rounds=2, layers=1, width=64, length=8, batch=1)
    result = measure.measure_shape(settings, settings.shapes()[0])
    assert [row.method for row in result.rows] == ["floor", "floor again", *names]
    assert result.skipped == {}


def test_a_shape_that_does_not_fit_leaves_the_others(monkeypatch):
    def expectations(base, batch):
        if len(base.state_dict()) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return real(base, batch)

    real = measure._expectations
    monkeypatch.setattr(measure, "_expectations", expectations)
    settings = BenchSettings(
        models="roberta,llama", methods=["column r=5"], rounds=2, layers=2, width=64, length=8, batch=1
    )
    first, second = measure.iterate(settings, lambda _: None)
    assert (first.rows, first.skipped) == ([], {"floor": "out of memory (CUDA out of memory.)"})
    assert len(second.rows) == 3


def die(*args):
    os._exit(1)


def test_a_killed_measurement_of_memory_is_reported(monkeypatch):
    monkeypatch.setattr(measure, "_peak", die)
    settings = BenchSettings(models="llama", methods="column r=5")
    with pytest.raises(BenchError, match=r"llama, column r=5: the process .* was killed.* give a smaller batch"):
        measure._peak_in_own_process(settings, settings.shapes()[0], "column r=5")


def test_figure_4_prints_its_panels(capsys):
    words = "bench --suite figure4 --models vit-b16 --rounds 2 --layers 1 --width 64 --batch 8 --memory true"
    assert main([*words.split(), "--methods", "row r=5,lora r=8"]) == 0
    printed = capsys.readouterr().out
    assert "10 epochs of 1,000 rows are 1250 steps" in printed
    assert "bfloat16" in printed
    assert "added MiB" in printed


def test_models_and_precision_follow_the_suite():
    default, figure4 = BenchSettings(), BenchSettings(suite="figure4")
    assert ([s.name for s in default.shapes()], default.dtype) == (["roberta", "llama"], "float32")
    assert [(s.name, s.batch) for s in figure4.shapes()] == [
        ("roberta-base", 64),
        ("vit-b16", 64),
        ("videomae-base", 64),
    ]
    assert figure4.dtype == "bfloat16"
    assert BenchSettings(suite="figure4", dtype="float32", models="vit-b16").dtype == "float32"


@pytest.mark.parametrize("family", ["vit", "videomae"])
@pytest.mark.parametrize("name", ["floor", "column r=5", "lora r=8", "ia3", "ln tuning", "bitfit", "window 1/2"])
def test_pictures_and_clips(name, family):
    made, expected, gradients = workload(name, TINY[family])
    made.check(expected, gradients)
    made.step()


def test_the_floor_reaches_the_embeddings_and_a_window_does_not():
    seen = {}
    for name in ("floor", "column r=5", "window 1/2"):
        made, _, _ = workload(name, TINY["roberta"])
        made.model.get_input_embeddings().register_forward_hook(
            lambda _, args, y, name=name: seen.__setitem__(name, y.requires_grad)
        )
        made.step()
    assert seen == {"floor": True, "column r=5": True, "window 1/2": False}


def test_a_window_keeps_less_and_columns_keep_the_floor():
    saved = {name: workload(name, TINY["roberta"])[0].saved_bytes() for name in ("floor", "column r=1", "row r=1")}
    saved["window"] = workload("window 1/2", TINY["roberta"])[0].saved_bytes()
    tokens, layers = 16, 12
    assert saved["window"] < saved["floor"] < saved["column r=1"] < saved["row r=1"]
    # a column slice keeps its columns and its index, nothing else
    assert saved["column r=1"] == saved["floor"] + layers * (tokens * 4 + 8)


@pytest.mark.parametrize("family", ["roberta", "llama", "vit", "videomae"])
def test_gradients_are_more_than_rounding(family):
    found = []
    for dtype in (torch.float32, torch.float64):
        model = make_model(TINY[family]).to(dtype)
        batch = make_batch(TINY[family], CPU, torch.float32)
        batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
        name, weight = next((n, p) for n, p in model.named_parameters() if p.dim() == 2 and "layer" in n)
        weight.requires_grad_()
        (gradient,) = torch.autograd.grad(step_loss(model, batch), weight)
        found.append(gradient.double())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-3, name


def test_alternate_mode_is_timed_in_both_orientations():
    made, *_ = workload("alternate r=5", TINY["llama"])
    (mover,) = movers_of(made.model)
    axes = []
    for _ in range(4):
        made.step()
        axes.append(next(iter(mover.slices().values())).axis)
    assert axes == ["row", "column", "column", "row"]
    assert made.saved_bytes() == workload("row r=5", TINY["llama"])[0].saved_bytes()


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_listing_1_leaves_a_language_models_head_alone(family):
    shape = replace(TINY[family], lm_head=True)
    made, expected, gradients = workload("listing 1 row r=5", shape)
    made.check(expected, gradients)
    assert isinstance(made.model.get_output_embeddings(), nn.Linear)


def test_peak_memory_is_of_steps_not_of_building():
    shape = find_shape("llama", layers=2, width=512, batch=1, length=8)  # 34 MiB of weights, hardly any activations
    settings = BenchSettings(models=["llama"], methods=["column r=5"], layers=2, width=512, batch=1, length=8)
    assert measure._peak_in_own_process(settings, shape, "column r=5") < 20 * 2**20


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    made, expected, gradients = workload("row r=5", TINY["roberta"])
    right = functional.block_gradient
    monkeypatch.setattr(functional, "block_gradient", lambda *args: 2 * right(*args))
    with pytest.raises(BenchError, match=r"row r=5: the gradient of Slice\(axis='row'.* is not the dense gradient's"):
        made.check(expected, gradients)


def test_a_method_that_starts_elsewhere_is_not_timed():
    made, expected, gradients = workload("lora r=8", TINY["roberta"])
    with pytest.raises(BenchError, match=r"lora r=8: its output differs from the base model's by"):
        made.check(expected + 1, gradients)


def test_a_method_that_trains_nothing_it_reaches_is_not_timed():
    def unused(model, family):
        model.unused = nn.Parameter(torch.zeros(1))
        return model

    shape = TINY["roberta"]
    base, batch = make_model(shape), make_batch(shape, CPU, torch.float32)
    expected, _ = measure._expectations(base, batch)
    with pytest.raises(BenchError, match=r"unused: no gradient, or one that is not finite"):
        Workload("unused", Method(unused), base, shape.family, batch).check(expected, None)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["row r=5", "column r=5", "additive column r=5 after 8 moves"])
def test_checkpointing_gives_the_same_gradients(name, reentrant):
    plain, *_ = workload(name, TINY["roberta"])
    again, *_ = workload(name, TINY["roberta"], recompute=reentrant)
    for made in (plain, again):
        step_loss(made.model, made.batch).backward()
    for mine, other in zip(plain.trained, again.trained, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert again.saved_bytes() < plain.saved_bytes()


@pytest.mark.parametrize("name", ["floor", "column r=5", "lora r=8", "full"])
def test_the_trainers_loop_makes_real_steps(name):
    shape = TINY["llama"]
    base, batch = make_model(shape), make_batch(shape, CPU, torch.float32)
    made = TrainerWorkload(name, METHODS[name], base, shape.family, batch)
    made.check(*measure._expectations(base, batch))
    before = [p.detach().clone() for p in made.trained]
    for _ in range(2):
        forward, seconds, optimizer = made.step()
        assert (forward, optimizer) == (0.0, 0.0)
        assert seconds > 0
        assert (made.state_bytes() > 0) is (name != "floor")
        assert made._trainer.state.global_step == 3
    if name != "floor":
        assert any(not torch.equal(a, b) for a, b in zip(before, made.trained, strict=True))
    if name.startswith("column"):
        (mover,) = movers_of(made.model)
        assert (mover.step, mover.visits) == (6, 1)


def test_rounds_are_interleaved_and_ratios_paired(monkeypatch):
    order = []

    def step(self):
        order.append(self.name)
        cost = {"floor": 1.0, "floor again": 1.0, "full": 3.0}[self.name] * len(order)  # the machine slows down
        return cost / 4, cost / 2, cost / 4

    monkeypatch.setattr(Workload, "step", step)
    settings = BenchSettings(models=["roberta"], methods=["full"], rounds=3, warmup=1, layers=1, width=64, length=8)
    result = measure.measure_shape(settings, settings.shapes()[0])
    # one round that warms up, three that count
    assert order == ["floor", "floor again", "full"] * 4
    rows = {row.method: row for row in result.rows}
    assert rows["floor"].ratio == 1.0
    assert rows["floor again"].ratio == pytest.approx(8 / 7)
    assert rows["full"].ratio == pytest.approx(3 * 9 / 7)
    assert rows["full"].per_second == pytest.approx(16 * 8 / 27)
    assert result.noise == pytest.approx((5 / 4 + 8 / 7) / 2 - 1)  # quartiles of 5/4, 8/7 and 11/10


def test_more_methods_than_fit_together_are_measured_in_groups(monkeypatch):
    order = []
    monkeypatch.setattr(Workload, "step", lambda self: order.append(self.name) or (1.0, 1.0, 1.0))
    settings = BenchSettings(
        models=["llama"], methods=["full", "bitfit", "lora r=8"], rounds=2, warmup=0, layers=1, width=64, length=8,
        batch=1, together=2,
    )  # fmt: skip
    result = measure.measure_shape(settings, settings.shapes()[0])
    assert order == ["floor", "floor again", "full"] * 2 + ["floor", "floor again", "lora r=8"] * 2
    assert [row.method for row in result.rows] == ["floor", "floor again", "full", "lora r=8"]
    assert list(result.skipped) == ["bitfit"]


def test_the_command_writes_its_files(tmp_path, capsys):
    words = ["bench", "--models", "[llama]", "--methods", "[column r=5, lora r=8]", "--rounds", "2", "--layers", "1"]
    words += [
        "--width",
        "64",
        "--batch",
        "2",
        "--length",
        "8",
        "--lm-head",
        "--memory",
        "--output",
        str(tmp_path / "b"),
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "column r=5" in printed
    assert "the floor differs from itself by up to" in printed
    record = json.loads((tmp_path / "b" / "bench.json").read_text())
    (result,) = record["results"]
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["floor", "floor again", "column r=5", "lora r=8"]
    assert rows["column r=5"]["extras"].keys() == {"move", "save", "load", "switch"}
    assert rows["column r=5"]["peak"] is not None  # of a model so small, perhaps nothing beyond what is there
    assert result["shape"]["lm_head"] is True
    assert (tmp_path / "b" / "bench.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "gpt9"], "'gpt9' is unknown; expected one of roberta, llama"),
        (["--models", "[gpt9]"], "'gpt9' is unknown; expected one of roberta, llama"),
        (["--methods", "[lora]"], "bench.methods: 'lora' is unknown; expected slices of any rank"),
        (["--models", ""], "bench.models is empty; name a shape"),
        (["--models", "[]"], "bench.models is empty; name a shape"),
        (["--suite", "all"], "bench.suite='all' is unknown; expected one of core"),
        (["--rounds", "1"], "bench.rounds=1 must be at least 2"),
        (["--width", "100"], "bench.width=100 must be a multiple of 64"),
        (["--batch", "0"], "bench.batch=0 must be at least 1"),
        (["--dtype", "int8"], "bench.dtype='int8' is unknown"),
        (["--loop", "mine"], "bench.loop='mine' is unknown; expected bare or trainer"),
        (["--loop", "trainer", "--compiled"], "bench.loop=trainer does not go with bench.compiled"),
        (["--reentrant"], "bench.reentrant=true is a kind of checkpointing"),
        (["--device", "tpu"], "bench.device='tpu' is unknown"),
        (["--output", "/dev/null/x"], "bench.output='/dev/null/x' cannot be made"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_measured(words, message, capsys):
    assert main(["bench", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_memory_is_kept_where_the_system_can_be_told(monkeypatch):
    keep_freed_memory()  # glibc takes every setting
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    with pytest.raises(UnsupportedError, match="C library cannot be told to keep memory"):
        keep_freed_memory()
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ConfigError, match="is for a CPU on Linux"):
        BenchSettings(keep_memory=True)


def test_names_may_come_with_commas():
    settings = BenchSettings(models="llama, roberta", methods="column r=5,lora r=8")
    assert [shape.name for shape in settings.shapes()] == ["llama", "roberta"]
    assert settings.method_names() == ["floor", "floor again", "column r=5", "lora r=8"]


def test_suites_name_methods_that_exist():
    for suite in SUITES:
        assert methods_of(suite, None)[:2] == ["floor", "floor again"]
        assert set(methods_of(suite, None)) <= set(METHODS)
    assert set(methods_of("full", None)) == set(METHODS)
    assert all(name == shape.name for name, shape in SHAPES.items())
    with pytest.raises(ConfigError, match=r"expected one of core"):
        methods_of("none", None)


def test_a_measured_model_is_freed():
    made, *_ = workload("column r=5", TINY["llama"])
    made.step()
    made.saved_bytes()
    weight = weakref.ref(next(p for n, p in made.model.named_parameters() if n.endswith("base_layer.weight")))
    del made
    gc.collect()
    assert weight() is None
