"""Measure methods interleaved: every round each of them makes one step, so that drift of the machine hits all alike."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .methods import FLOOR, find_method
from .settings import BenchSettings
from .shapes import Shape, make_batch, make_model, step_loss
from .workload import BenchError, Workload, enable_checkpointing, keep_freed_memory

__all__ = ["Row", "ShapeResult", "iterate", "measure_shape"]


@dataclass
class Row:
    """What was measured of one method. Times are seconds, sizes bytes; ratios are to the floor of the same round.

    Attributes:
        ratio, low, high: median and quartiles of step time / floor.
        step, forward, backward, optimizer: median seconds.
        per_second: tokens, images or clips per second at the median step.
        saved: bytes that the forward keeps for backward, weights left out.
        peak: peak memory of a step beyond what is there before it (weights, optimizer state): on a GPU the
            allocator's, on a CPU the resident set's of a process of its own; None if not measured.
        state: bytes of optimizer state.
        weights: bytes of the base's weights.
        added: bytes of parameters and buffers beyond them while it trains; of slices, copies of entries of weights.
        trainable: entries in training at a time.
        file: bytes of the file that a user keeps, before the first timed move.
        extras: seconds of a move, of saving, loading and switching, where the method has them.
    """

    method: str
    ratio: float
    low: float
    high: float
    step: float
    forward: float
    backward: float
    optimizer: float
    per_second: float
    saved: int
    state: int
    trainable: int
    file: int
    weights: int
    added: int
    peak: int | None = None
    extras: dict[str, float] = field(default_factory=dict)


@dataclass
class ShapeResult:
    """All rows of one model shape, the methods that it cannot have, with the reason, and the noise.

    Attributes:
        noise: how far the floor lies from itself: the quartile of the second floor's ratio that is farthest from 1, as
            its distance from there, the largest over groups.
    """

    shape: Shape
    rows: list[Row]
    skipped: dict[str, str]
    noise: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def measure_shape(settings: BenchSettings, shape: Shape, report: Callable[[str], None] = lambda _: None) -> ShapeResult:
    """Measure all methods on one shape, some of them at a time (``settings.together``) beside the floor.

    A method that a model lacks the layers for, or that the device has no memory for, is named with the reason.

    Args:
        settings: what to measure.
        shape: the model.
        report: told about progress.

    Raises:
        BenchError: if a method does not compute what it should; then nothing is timed.
    """
    if settings.keep_memory:  # in this process: peak memory is measured in others
        keep_freed_memory()
    device, dtype = torch.device(settings.device), settings.torch_dtype
    names = settings.method_names()[2:]
    rows: dict[str, Row] = {}
    skipped: dict[str, str] = {}
    noise = 0.0
    base = make_model(shape, settings.seed).to(device, dtype)
    batch = make_batch(shape, device, dtype, settings.seed + 1)
    if settings.recompute is not None:
        enable_checkpointing(base, settings.recompute)
    expectations = _expectations(base, batch)
    together = settings.together or _fitting(base, device)
    groups = [names[at : at + together] for at in range(0, max(1, len(names)), together)]
    while groups:
        group = groups.pop(0)
        try:
            measured, missing = _measure_group(settings, shape, base, batch, group, expectations, report)
        except torch.OutOfMemoryError as error:
            reason = f"out of memory ({str(error).splitlines()[0]})"
        else:
            reason = ""
            skipped |= missing
            again = measured["floor again"]
            noise = max(noise, abs(again.low - 1), abs(again.high - 1))
            for name, row in measured.items():
                rows.setdefault(name, row)
        _release(device)
        if reason and len(group) > 1:  # perhaps they only do not fit together
            groups[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]
        elif reason:
            skipped |= dict.fromkeys(group or [FLOOR], reason)
    if settings.memory and device.type == "cpu":
        for name, row in rows.items():
            report(f"{shape.name}: peak memory of {name}")
            row.peak = _peak_in_own_process(settings, shape, name)
    return ShapeResult(shape, list(rows.values()), skipped, noise)


def _fitting(base: nn.Module, device: torch.device) -> int:
    """How many copies of a model there is room for beside the floors, where one may be fine-tuned in full: 1 to 8."""
    _release(device)
    try:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _memory("MemAvailable", "/proc/meminfo")
    except UnsupportedError:  # no Linux: nothing tells
        return 8
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    # two floors, the dense gradients of the checks, gradients and two moments of a full method; half for activations
    return max(1, min(8, int(free / 2 / size) - 6))


def _workload(settings: BenchSettings, name: str, base: nn.Module, shape: Shape, batch: dict[str, Tensor]) -> Workload:
    kind = Workload
    if settings.loop == "trainer":
        from .through_trainer import TrainerWorkload as kind  # noqa: N813
    return kind(name, find_method(name), base, shape.family, batch, settings.recompute, settings.compiled)


def _expectations(base: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The base's output and the dense gradients of its matrices, which slices are checked against."""
    matrices = {name: p for name, p in base.named_parameters() if p.dim() == 2}
    base.train().requires_grad_(False)
    for parameter in matrices.values():
        parameter.requires_grad_(True)
    step_loss(base, batch).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in matrices.items() if p.grad is not None}
    base.requires_grad_(False)
    for parameter in matrices.values():
        parameter.grad = None
    with torch.no_grad():
        output = base(**batch)
    return (output.logits if "labels" in batch else output.last_hidden_state).float(), gradients


def _release(device: torch.device) -> None:
    """Free what models leave behind: their layers and movers know each other, so that only a collection finds them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure_group(
    settings: BenchSettings,
    shape: Shape,
    base: nn.Module,
    batch: dict[str, Tensor],
    names: list[str],
    expectations: tuple[Tensor, dict[str, Tensor]],
    report: Callable[[str], None],
) -> tuple[dict[str, Row], dict[str, str]]:
    """Rows of the floors and of some methods, interleaved; and the methods that the model lacks the layers for."""
    report(f"{shape.name}: building and checking {', '.join(names)}")
    workloads: dict[str, Workload] = {}
    files: dict[str, int] = {}
    missing: dict[str, str] = {}
    for name in (FLOOR, "floor again", *names):
        try:
            workload = _workload(settings, name, base, shape, batch)
        except UnsupportedError as error:
            missing[name] = str(error)
            continue
        workload.check(*expectations)
        files[name] = workload.file_bytes()  # before a timed move makes it grow
        workloads[name] = workload
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in workloads}
    gc.collect()
    gc.freeze()  # what is built stays: collecting before each step then takes milliseconds
    try:
        for number in range(settings.warmup + settings.rounds):
            report(f"{shape.name}: round {number + 1} of {settings.warmup + settings.rounds}")
            for name, workload in workloads.items():
                gc.collect()
                measured = workload.step()
                if number >= settings.warmup:
                    times[name].append(measured)
    finally:
        gc.unfreeze()
    floor = [sum(t) for t in times[FLOOR]]
    rows = {name: _row(shape, workload, times[name], floor, files[name]) for name, workload in workloads.items()}
    return rows, missing


def _row(
    shape: Shape, workload: Workload, times: list[tuple[float, float, float]], floor: list[float], file: int
) -> Row:
    totals = [sum(t) for t in times]
    ratios = [mine / other for mine, other in zip(totals, floor, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    step = statistics.median(totals)
    forward, backward, optimizer = (statistics.median(t[i] for t in times) for i in range(3))
    peak = workload.peak_step() if workload.device.type == "cuda" else None
    return Row(
        workload.name, middle, low, high, step, forward, backward, optimizer, shape.items[0] / step,
        workload.saved_bytes(), workload.state_bytes(), workload.trainable(), file, workload.base_bytes,
        workload.added_bytes(), peak, workload.extras(),
    )  # fmt: skip


def _peak_in_own_process(settings: BenchSettings, shape: Shape, name: str) -> int:
    """Growth of a fresh process's largest resident set over three steps, the model itself left out."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak, settings, shape, name).result()
        except BrokenProcessPool as error:
            raise BenchError(
                f"{shape.name}, {name}: the process that measured its peak memory was killed, as happens when memory "
                "runs out; give a smaller batch, or leave memory out."
            ) from error


def _peak(settings: BenchSettings, shape: Shape, name: str) -> int:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    base = make_model(shape, settings.seed).to(settings.torch_dtype)
    batch = make_batch(shape, torch.device("cpu"), settings.torch_dtype, settings.seed + 1)
    workload = _workload(settings, name, base, shape, batch)
    del base
    gc.collect()
    workload.step()  # gradients' and optimizer's buffers are there from now on
    gc.collect()
    before = _memory("VmRSS", _STATUS)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    for _ in range(3):
        workload.step()
    return max(0, _memory("VmHWM", _STATUS) - before)


_STATUS = "/proc/self/status"


def _memory(name: str, source: str) -> int:
    """An entry of a list of memory sizes in bytes (Linux)."""
    path = Path(source)
    for line in path.read_text(encoding="ascii").splitlines() if path.exists() else ():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise UnsupportedError(f"bench: this system does not tell {name}; leave memory out.")


def iterate(settings: BenchSettings, report: Callable[[str], None]) -> Iterator[ShapeResult]:
    """Measure shape after shape."""
    if settings.compiled:  # all models of one family share their code objects, and with them one budget of graphs
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 4096
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    for shape in settings.shapes():
        try:
            result = measure_shape(settings, shape, report)
        except torch.OutOfMemoryError as error:  # the other shapes may fit
            result = ShapeResult(shape, [], {FLOOR: f"out of memory ({str(error).splitlines()[0]})"}, 0.0)
        yield result
