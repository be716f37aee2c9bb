"""What `analyze shift` shows: a row per adapter, notes, and the pictures of Figures 7 and 8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from ..charts import Chart, Line, Panel
from ..training.counts import layer_kind

__all__ = ["Shift", "shift_charts", "shift_notes", "shift_row"]


@dataclass
class Shift:
    """How far one model went.

    Attributes:
        name: of the adapter.
        metric: name of the task's main metric.
        score: of the tuned model on the rows; None for a language model.
        base_score: of the base with its own head; None without one.
        divergence: KL_D(theta_r || theta_b), in nats (Appendix C.2), per token of a language model; None without
            classes.
        own_head: whether the base has a head of its own; else the divergence and the kernel are those of the base's
            blocks under the tuned model's head.
        blocks: names of the blocks.
        cka: linear CKA of each block (Appendix C.3).
        debiased: the same from the unbiased estimate; NaN where it cannot be estimated.
        shuffled: linear CKA with the tuned model's rows shuffled: what unrelated features of this size give.
        layers: relative change of each linear layer's weight.
        slices: relative change of each trained slice of each layer from the base that it was trained on.
        ntk_layers: what the kernel's parameters are; empty without a kernel.
        ntk_distance: relative Frobenius distance of the two kernels; None without one.
        ntk_alignment: their cosine.
        notes: what was left out, and why.
    """

    name: str
    metric: str
    score: float | None
    base_score: float | None
    divergence: float | None
    own_head: bool
    blocks: list[str]
    cka: list[float]
    debiased: list[float]
    shuffled: list[float]
    layers: dict[str, float]
    slices: dict[str, list[float]]
    ntk_layers: list[str] = field(default_factory=list)
    ntk_distance: float | None = None
    ntk_alignment: float | None = None
    notes: list[str] = field(default_factory=list)


def shift_row(found: Shift) -> list[str]:
    """One adapter's line of the table."""
    kinds = list(found.layers.values())
    divergence = _number(found.divergence, ".4f") + ("" if found.own_head or found.divergence is None else "*")
    return [
        found.name,
        found.metric,
        _number(found.base_score, ".4f"),
        _number(found.score, ".4f"),
        divergence,
        f"{found.cka[-1]:.4f}",
        f"{min(found.cka):.4f} ({found.cka.index(min(found.cka))})",
        f"{median(kinds):.2%}",
        _number(found.ntk_distance, ".3f"),
        _number(found.ntk_alignment, ".4f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def shift_notes(found: Sequence[Shift]) -> list[str]:
    """What the numbers mean, and what was left out."""
    notes = [
        "KL in nats, mean over rows. CKA of blocks, with the number of the least alike. weights: median over layers of "
        "the change's norm, as a share of the base weight's. NTK: relative distance of the kernels, and their cosine."
    ]
    if any(not each.own_head for each in found):
        notes.append(
            "* The base has no head for these classes: a new one is random. KL and NTK compare its blocks under the "
            "tuned model's head; the paper's KL needs --base with a run that has the same classes."
        )
    if any(each.divergence is None for each in found):
        notes.append("No KL for a task without classes.")
    least = min(value for each in found for value in each.shuffled)
    most = max(value for each in found for value in each.shuffled)
    notes.append(f"Unrelated features of the same size (rows shuffled) have a CKA of {least:.3f} to {most:.3f}.")
    for each in found:
        kinds = ", ".join(f"{kind.rpartition('*.')[2]} {change:.2%}" for kind, change in _by_kind(each.layers).items())
        notes.append(f"{each.name}: change of weights by kind: {kinds}.")
        notes += each.notes
    return notes


def shift_charts(found: Sequence[Shift]) -> list[Chart]:
    """Predictions, representations and weights."""
    charts = [_cka_chart(found), _weight_chart(found)]
    if any(each.divergence is not None for each in found):
        charts.append(_prediction_chart(found))
    return charts


def _prediction_chart(found: Sequence[Shift]) -> Chart:
    """Figure 7; an asterisk tells the bases that have no head of their own."""
    known = [each for each in found if each.divergence is not None]
    names = [each.name if each.own_head else f"{each.name}*" for each in known]
    values = [each.divergence or 0.0 for each in known]
    panels = [Panel("KL to the base", [Line("", names, values, style="bars")], "", "nats")]
    scored = [each for each in found if each.score is not None]
    if scored:
        lines = [Line("tuned", [each.name for each in scored], [each.score or 0.0 for each in scored], style="bars")]
        if any(each.base_score is not None for each in scored):
            before = [float("nan") if each.base_score is None else each.base_score for each in scored]
            lines.append(Line("base", [each.name for each in scored], before, style="bars"))
        panels.append(Panel("main metric", lines, "", "score"))
    words = "; ".join(f"{name} {value:.4g}" for name, value in zip(names, values, strict=True))
    return Chart("shift_predictions", "Prediction shift (Figure 7)", panels, f"KL in nats: {words}.")


def _cka_chart(found: Sequence[Shift]) -> Chart:
    """Figure 8: lines over the blocks, and one heat map for all adapters of the same depth."""
    lines = [Line(each.name, list(range(len(each.cka))), each.cka) for each in found]
    floor = {"rows shuffled": sum(found[0].shuffled) / len(found[0].shuffled)}
    panels = [Panel("linear CKA with the base", lines, "block", "CKA", levels=floor)]
    lines = [Line(each.name, list(range(len(each.debiased))), each.debiased) for each in found]
    panels.append(Panel("debiased", lines, "block", "CKA", levels={"unrelated": 0.0}))
    depth = max(len(each.cka) for each in found)
    rows = [[each.cka[block] if block < len(each.cka) else float("nan") for each in found] for block in range(depth)]
    names = [each.name for each in found]
    blocks = [str(block) for block in range(depth)]
    panels.append(Panel("", (), "", "block", matrix=rows, row_names=blocks, column_names=names, scale="CKA"))
    words = "; ".join(
        f"{each.name} from {each.cka[0]:.4g} in block 0 to {each.cka[-1]:.4g} in the last" for each in found
    )
    return Chart("shift_cka", "Change of representations (Figure 8)", panels, f"CKA: {words}.")


def _weight_chart(found: Sequence[Shift]) -> Chart:
    """Relative change by kind of layer, and of single slices in falling order."""
    kinds = list(dict.fromkeys(kind for each in found for kind in _by_kind(each.layers)))
    short = [kind.rpartition("*.")[2] for kind in kinds]
    bars = []
    for each in found:
        changes = _by_kind(each.layers)
        bars.append(Line(each.name, short, [changes.get(kind, float("nan")) for kind in kinds], style="bars"))
    panels = [Panel("weights by kind of layer (median)", bars, "", "change / norm of the base")]
    curves = []
    for each in found:
        values = sorted((value for changes in each.slices.values() for value in changes), reverse=True)
        if values:
            curves.append(Line(each.name, [100 * i / len(values) for i in range(len(values))], values))
    if curves:
        panels.append(Panel("single slices", curves, "slices (%), largest change first", "change / norm of the base"))
    words = "; ".join(f"{each.name}: median {median(each.layers.values()):.3g}" for each in found)
    return Chart("shift_weights", "Change of weights", panels, f"Share of the base weight's norm: {words}.")


def _by_kind(layers: dict[str, float]) -> dict[str, float]:
    """The median change of the layers of one kind."""
    groups: dict[str, list[float]] = {}
    for name, change in layers.items():
        groups.setdefault(layer_kind(name), []).append(change)
    return {kind: median(changes) for kind, changes in groups.items()}
