"""Slices and adapters at one layer and one example: how their Jacobians meet the task subspace (Lemma D.1)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..analysis.collect import output_gradients, slice_jacobian
from ..analysis.spans import Certificate, certificate, logit_gradient, lora_jacobian, lora_overlap
from ..analysis.winners import Overlap, layer_overlap, overlap
from ..geometry import Slice
from .common import Opened

__all__ = ["PLACES", "Case", "Example", "Reach", "examples_of", "layer_cases", "logit_cases", "reaches", "single_rows"]

PLACES = ("layer, mean", "layer, positions", "logits")


@dataclass(frozen=True)
class Case:
    """One slice or adapter at one example.

    Attributes:
        place: where features are taken: the mean over the layer's positions, all of them, or the logits.
        what: row, column, LoRA; a wide row or column has about as many entries as the LoRA.
        layer: its name.
        example: number of the example.
        entries: trainable ones.
        k: directions of the task subspace, those of all positions together.
        gamma: smallest singular value of U_k^T J.
        beta: largest one of the rest of J.
        rank: of U_k^T J.
        premise: whether beta < gamma.
        rho: ||g_perp|| / ||g_task||.
        bound: gamma ||g_task|| - beta ||g_perp||.
        measured: the restricted gradient's norm.
        holds: whether the bound is kept.
        vacuous: whether it says nothing.
    """

    place: str
    what: str
    layer: str
    example: int
    entries: int
    k: int
    gamma: float
    beta: float
    rank: int
    premise: bool
    rho: float
    bound: float
    measured: float
    holds: bool
    vacuous: bool


@dataclass(frozen=True)
class Reach:
    """What is trained in a layer: a slice, or a LoRA's B with A given.

    Attributes:
        what: in words.
        layer: its name.
        block: the slice; None for a LoRA.
        factor: A of a LoRA; None for a slice.
        entries: trainable ones; a LoRA's A counts, though its gradient is zero at B = 0.
    """

    what: str
    layer: str
    block: Slice | None
    factor: Tensor | None
    entries: int

    def overlap(self, inputs: Tensor, subspace: Tensor) -> Overlap:
        """At the layer's own output."""
        if self.factor is not None:
            return lora_overlap(inputs, self.factor, subspace)
        assert self.block is not None
        return layer_overlap(inputs, self.block, subspace)

    def part(self, whole: Tensor) -> Tensor:
        """``(outputs, entries)``, from the Jacobian of the whole weight, ``(outputs, rows, columns)``."""
        if self.factor is not None:
            return lora_jacobian(whole, self.factor)
        assert self.block is not None
        lines = slice(self.block.start, self.block.start + self.block.width)
        return (whole[:, lines] if self.block.axis == "row" else whole[:, :, lines]).flatten(1)


@dataclass
class Example:
    """One row of data at one layer.

    Attributes:
        number: of the row.
        batch: the row without padding.
        inputs: of the layer, ``(positions, in)``.
        gradient: of the loss with respect to the layer's output, ``(positions, out)``.
    """

    number: int
    batch: dict[str, Tensor]
    inputs: Tensor
    gradient: Tensor

    @property
    def weight_gradient(self) -> Tensor:
        """Of the whole weight, ``(1, rows, columns)``, fp64."""
        return (self.gradient.double().t() @ self.inputs.double())[None]


def single_rows(batches: Sequence[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """The first rows as batches of their own, their padding cut off."""
    found = []
    for batch in batches:
        mask = batch.get("attention_mask")
        for i in range(len(batch["labels"])):
            row = {name: value[i : i + 1] for name, value in batch.items()}
            if mask is not None and mask.dim() == 2:
                kept = mask[i].bool()
                row = {name: value[:, kept] if value.shape[1:] == kept.shape else value for name, value in row.items()}
            found.append(row)
            if len(found) == count:
                return found
    return found


def reaches(layer: str, shape: tuple[int, int], r: int, positions: int, lora_rank: int, seed: int) -> list[Reach]:
    """Slices at random positions, a LoRA with A as PEFT draws it (scale 1), and slices of as many entries as it has."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(layer.encode()))
    rows, columns = shape
    entries = lora_rank * (rows + columns)
    wanted = [
        ("row", "row", r, positions),
        ("column", "column", r, positions),
        ("wide row", "row", round(entries / columns), 1),
        ("wide column", "column", round(entries / rows), 1),
    ]
    found = []
    for what, axis, width, count in wanted:
        size, length = (rows, columns) if axis == "row" else (columns, rows)
        width = min(max(1, width), size)
        for start in torch.randperm(size - width + 1, generator=generator)[:count].tolist():
            found.append(Reach(what, layer, Slice(axis, start, width), None, width * length))
    limit = 1 / math.sqrt(columns)  # kaiming_uniform_ with a = sqrt(5)
    factor = (2 * torch.rand(lora_rank, columns, generator=generator, dtype=torch.float64) - 1) * limit
    return [*found, Reach("LoRA", layer, None, factor, entries)]


def examples_of(opened: Opened, rows: Sequence[dict[str, Tensor]], layer: str) -> list[Example]:
    """Inputs and output gradients of one layer."""
    pairs = output_gradients(opened.model, rows, [layer])[layer]
    return [
        Example(number, batch, inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
        for number, (batch, (inputs, gradient)) in enumerate(zip(rows, pairs, strict=True))
    ]


def layer_cases(own: Sequence[Reach], examples: Sequence[Example], subspace: Tensor) -> list[Case]:
    """At the layer's output: as the mean over positions, and exactly, with all positions side by side.

    The mean is the paper's one vector per example. Its gradient is that of a shift of all positions, and its bound
    is no theorem for several positions; the one with all positions is.
    """
    found = []
    for example in examples:
        means = example.inputs.mean(0), example.gradient.double().sum(0)
        for reach in own:
            measured = float(torch.linalg.vector_norm(reach.part(example.weight_gradient)))
            for place, inputs, gradient in (
                (PLACES[0], *means),
                (PLACES[1], example.inputs, example.gradient),
            ):
                met = reach.overlap(inputs, subspace)
                made = certificate(met, gradient, subspace, measured)
                count = subspace.shape[1] * (len(inputs) if inputs.dim() == 2 else 1)
                found.append(_case(place, reach, example, count, met, made))
    return found


def logit_cases(
    opened: Opened, own: Sequence[Reach], examples: Sequence[Example], subspace: Tensor
) -> tuple[list[Case], list[list[Tensor]], list[Tensor]]:
    """At the logits: cases, Jacobians of each slice by example, and the whole weight's by example."""
    found, parts, whole = [], [[] for _ in own], []  # type: ignore[var-annotated]
    for example in examples:
        layer, (rows, columns) = own[0].layer, example.weight_gradient.shape[1:]
        jacobian = slice_jacobian(opened.model, example.batch, layer, Slice("row", 0, rows)).cpu()
        with torch.no_grad():
            logits = opened.model(**example.batch).logits[0].cpu()
        gradient = logit_gradient(logits, example.batch["labels"][0].cpu())
        whole.append(jacobian)
        for reach, kept in zip(own, parts, strict=True):
            kept.append(reach.part(jacobian.reshape(-1, rows, columns)))
            met = overlap(kept[-1], subspace)
            measured = float(torch.linalg.vector_norm(reach.part(example.weight_gradient)))
            made = certificate(met, gradient, subspace, measured)
            found.append(_case(PLACES[2], reach, example, subspace.shape[1], met, made))
    return found, parts, whole


def _case(place: str, reach: Reach, example: Example, k: int, met: Overlap, made: Certificate) -> Case:
    return Case(
        place,
        reach.what,
        reach.layer,
        example.number,
        reach.entries,
        k,
        met.gamma,
        met.beta,
        met.rank,
        met.premise_holds,
        made.rho,
        made.bound,
        made.measured,
        made.holds,
        made.vacuous,
    )
