"""Remark B.1 in numbers: tangent kernels of the readout and of slices beside the Gram matrix of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.collect import features, logits_of, slice_jacobian
from ..analysis.kernels import kernel_alignment, kernel_distance, ntk, readout_ntk, unbiased_cka
from ..charts import Chart, Line, Panel
from ..errors import DataError, NumericalError
from ..geometry import Slice
from ..weights import supports
from .common import Opened

__all__ = ["Alignment", "Kernels", "alignment_chart", "measure_kernels", "readout_of"]


@dataclass(frozen=True)
class Alignment:
    """A tangent kernel (trace over outputs) beside kernels of features.

    Attributes:
        name: whose kernel: a readout's or a slice's.
        features: whose features: a module's name.
        alignment: with H H^T; all features share a large mean, so that this is high for most kernels.
        cka: with the centred kernel of Lemma 2.5. Of few examples with many features it is high for any two kernels.
        unbiased: CKA without that bias; 0 in the mean for unrelated kernels.
        null_cka, null: the same with random features of the same shape instead.

    A value is None where the tangent kernel is zero or constant.
    """

    name: str
    features: str
    alignment: float | None
    cka: float | None
    unbiased: float | None
    null_cka: float | None
    null: float | None


@dataclass(frozen=True)
class Kernels:
    """What Remark B.1 says, measured.

    Attributes:
        readout: the last linear layer.
        examples: number of them.
        readout_difference: ||NTK - (H H^T) (x) I|| / ||NTK|| of the readout's weight: rounding, as the Remark says.
        centred_difference: the same with centred features, which the Remark writes: not rounding.
        alignments: of the readout and of slices.
    """

    readout: str
    examples: int
    readout_difference: float
    centred_difference: float
    alignments: list[Alignment]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def readout_of(opened: Opened) -> str | None:
    """The last linear layer: the one whose output is the logits; None if there is none."""
    batch = opened.batches[:1]
    logits = logits_of(opened.model, batch)
    modules: list[tuple[str, nn.Module]] = list(opened.model.named_modules())
    for name, module in reversed(modules):
        if name and supports(module):
            try:
                # the last position, where a model classifies sequences by it
                given = features(opened.model, batch, [name], "last")[name]
            except DataError:  # never reached
                continue
            if given.shape == logits.shape and torch.allclose(given, logits):
                return name
    return None


def measure_kernels(
    opened: Opened, readout: str, block: str, hidden: Tensor, slices: Sequence[tuple[str, Slice]], count: int, seed: int
) -> Kernels:
    """Tangent kernels of the logits, for the readout's whole weight and for slices, beside those of features.

    Args:
        opened: model and rows.
        readout: the last linear layer.
        block: name of the block whose features are ``hidden``.
        hidden: its features, ``(n, d)``.
        slices: layers and their slices.
        count: examples at most; each costs one backward per output and slice.
        seed: of the random features.
    """
    examples = _examples(opened.batches, count)
    count = len(examples)
    inputs = features(opened.model, examples, [readout], "last", "input")[readout]
    outputs = int(logits_of(opened.model, examples[:1]).shape[1])
    whole = _jacobians(opened, examples, readout, Slice("row", 0, outputs))
    tangent, closed = ntk(whole), readout_ntk(inputs, outputs)
    centred = readout_ntk(inputs - inputs.mean(0), outputs)
    known = {readout: inputs, block: hidden[:count]}
    found = _alignments("readout", ntk(whole, trace=True), known, seed)
    for layer, chosen in slices:
        kernel = ntk(_jacobians(opened, examples, layer, chosen), trace=True)
        found += _alignments(f"{layer} {chosen.axis} {chosen.start}+{chosen.width}", kernel, known, seed)
    return Kernels(readout, count, kernel_distance(tangent, closed), kernel_distance(tangent, centred), found)


def alignment_chart(kernels: Kernels) -> Chart:
    """Unbiased CKA of each tangent kernel with each kernel of features, beside random features."""
    panels = []
    for name in dict.fromkeys(item.features for item in kernels.alignments):
        own = [item for item in kernels.alignments if item.features == name]
        labels = [".".join(item.name.split(".")[-2:]) for item in own]
        lines = [
            Line(label, labels, [float("nan") if value is None else value for value in values], style="bars")
            for label, values in (("measured", [i.unbiased for i in own]), ("random features", [i.null for i in own]))
        ]
        panels.append(Panel(f"features: {name}", lines, "parameters", "unbiased CKA"))
    words = "; ".join(f"{item.name} with {item.features} {_shown(item.unbiased)}" for item in kernels.alignments)
    return Chart(
        "energy_alignment", "Tangent kernels beside kernels of features", panels, f"Unbiased CKA: {words}.", across=1
    )


def _jacobians(opened: Opened, examples: Sequence[dict[str, Tensor]], layer: str, block: Slice) -> list[Tensor]:
    return [slice_jacobian(opened.model, example, layer, block).cpu() for example in examples]


def _examples(batches: Sequence[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Batches of one row each."""
    rows = [
        {name: value[i : i + 1] for name, value in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]
    return rows[:count]


def _alignments(name: str, kernel: Tensor, known: dict[str, Tensor], seed: int) -> list[Alignment]:
    result = []
    for module, rows in known.items():
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gram, random = readout_ntk(rows), readout_ntk(noise)
        values = [
            _value(kernel_alignment, kernel, gram),
            _value(partial(kernel_alignment, centred=True), kernel, gram),
            _value(unbiased_cka, kernel, gram),
            _value(partial(kernel_alignment, centred=True), kernel, random),
            _value(unbiased_cka, kernel, random),
        ]
        result.append(Alignment(name, module, *values))
    return result


def _value(measure: Callable[[Tensor, Tensor], float], kernel: Tensor, other: Tensor) -> float | None:
    try:
        return measure(kernel, other)
    except NumericalError:  # zero, or constant
        return None


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
