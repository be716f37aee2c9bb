"""What `analyze overlap` shows: a row per place and kind of slice, and where the premises fail."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from ..charts import Chart, Line, Panel
from .common import Result
from .overlap_cases import PLACES, Case
from .overlap_pruning import Pruned, falls

if TYPE_CHECKING:
    from .overlap import Measured, Settings

__all__ = ["report", "summary"]


def report(settings: Settings, found: Measured) -> Result:
    """Table, numbers, charts and notes."""
    groups = _groups(found.cases)
    counts = {f"{place}: {what}": summary(own) for (place, what), own in groups.items()}
    charts = [_overlap_chart(groups), _span_chart(found, settings), _pruning_chart(found)]
    return Result(
        name="overlap",
        title=f"overlap with the task subspace, slices of r={settings.r}: medians and shares",
        columns=["where, what", "cases", "gamma", "beta", "per entry", "rank k", "premise", "rho", "kept", "says"],
        rows=[_row(place, what, own) for (place, what), own in groups.items()],
        numbers={
            "k": found.k,
            "layers": found.layers,
            "summary": counts,
            "cases": [asdict(case) for case in found.cases],
            "spans": {what: [asdict(own) for own in spans] for what, spans in found.spans.items()},
            "rows and columns": [asdict(own) for own in found.joints],
            "pruning": [asdict(own) for own in found.pruned],
            "falls of r*": {block: falls([own.rank for own in rows]) for block, rows in _blocks(found).items()},
        },
        charts=[chart for chart in charts if chart.panels],
        notes=_notes(settings, found, groups),
    )


def summary(cases: Sequence[Case]) -> dict[str, Any]:
    """Shares and medians over cases of one kind; rho over those where it is finite."""
    finite = [case.rho for case in cases if math.isfinite(case.rho)]
    return {
        "cases": len(cases),
        "entries": median(case.entries for case in cases),
        "gamma": median(case.gamma for case in cases),
        "gamma per root of entries": median(case.gamma / math.sqrt(case.entries) for case in cases),
        "beta": median(case.beta for case in cases),
        "full rank": mean(case.rank >= case.k for case in cases),
        "premise": mean(case.premise for case in cases),
        "rho": median(finite) if finite else math.inf,
        "rho below 1": mean(case.rho < 1 for case in cases),
        "bound kept": mean(case.holds for case in cases),
        "bound says something": mean(not case.vacuous for case in cases),
        "bound over measured": median(max(0.0, case.bound) / case.measured for case in cases if case.measured > 0)
        if any(case.measured > 0 for case in cases)
        else math.nan,
    }


def _groups(cases: Iterable[Case]) -> dict[tuple[str, str], list[Case]]:
    found: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        found.setdefault((case.place, case.what), []).append(case)
    return dict(sorted(found.items(), key=lambda item: PLACES.index(item[0][0])))


def _row(place: str, what: str, cases: Sequence[Case]) -> list[str]:
    own = summary(cases)
    return [
        f"{place}: {what}",
        str(len(cases)),
        f"{own['gamma']:.2e}",
        f"{own['beta']:.2e}",
        f"{own['gamma per root of entries']:.1e}",
        f"{own['full rank']:.0%}",
        f"{own['premise']:.0%}",
        f"{own['rho']:.2f}",
        f"{own['bound kept']:.0%}",
        f"{own['bound says something']:.0%}",
    ]


def _blocks(found: Measured) -> dict[str, list[Pruned]]:
    result: dict[str, list[Pruned]] = {}
    for own in found.pruned:
        result.setdefault(own.block, []).append(own)
    return result


# -- notes ------------------------------------------------------------------------------------------------------------


def _notes(settings: Settings, found: Measured, groups: dict[tuple[str, str], list[Case]]) -> list[str]:
    notes = [
        "Columns: gamma and beta of Lemma D.1; gamma / root of the number of entries; share of cases in which U_k^T J "
        "has rank k (Theorem 2.4), and in which beta < gamma (premise); rho = ||g_perp|| / ||g_task||; share of cases "
        "in which the gradient keeps the bound gamma ||g_task|| - beta ||g_perp||; share in which that is above zero, "
        "so that it says something. Wide slices have about as many entries as the LoRA.",
        f"Layer: k={found.k} top singular vectors of the layer's outputs (mean over positions). A row slice of r < k "
        "has gamma = 0 there, and a column slice or a LoRA gamma = beta: in closed form, the premise beta < gamma "
        "cannot hold for them. With all positions side by side gamma = 0 for columns, too, if there are more positions "
        "than columns in the slice. A vacuous bound is kept by any gradient; the mean's bound is no theorem.",
    ]
    if found.classes is None:
        notes.append("Logits: left out, for a language model has a vocabulary of them at each position.")
    else:
        notes += [_logit_note(settings, found, groups), *_span_notes(settings, found)]
    notes.append(_adapter_note(settings, groups))
    return [*notes, _joint_note(settings, found), *_pruning_notes(settings, found)]


def _logit_note(settings: Settings, found: Measured, groups: dict[tuple[str, str], list[Case]]) -> str:
    k = found.cases[-1].k if found.cases else 0
    words = []
    for what in ("row", "column"):
        own = summary(groups[PLACES[2], what])
        words.append(
            f"{what}s have rank >= k in {own['full rank']:.0%} of cases, keep the premise in {own['premise']:.0%}, and "
            f"the bound is {own['bound over measured']:.1%} of the gradient (median)"
        )
    centred = ", after each example's mean is taken off" if found.classes != 1 else ""
    every = " With all k of them, g_perp = 0." if k == found.classes - 1 else ""  # type: ignore[operator]
    return (
        f"Logits: k={k} of {found.classes}{centred}.{every} {'; '.join(words)}. Rank below k: the slice reaches the "
        "head through fewer than k numbers, as a row near the top does where one position is read. With full rank one "
        "example's gradient is zero only if that of its logits is, but the mean over examples can still cancel."
    )


def _span_notes(settings: Settings, found: Measured) -> list[str]:
    words = []
    for what, spans in found.spans.items():
        full = next((m for m, own in enumerate(spans, 1) if own.rank >= spans[-1].outputs), None)
        reached = f"all at m={full}" if full else f"{spans[-1].rank} at m={len(spans)}"
        words.append(f"{what} {spans[0].rank} at m=1, {reached} (effective {spans[-1].effective:.1f})")
    outputs = next(iter(found.spans.values()))[0].outputs
    return [
        f"Span of the Jacobians of m slices (equation 5) over {outputs} outputs ({settings.examples} examples times "
        f"{found.classes} logits): {'; '.join(words)}. A singular value counts from 1e-5 of the largest one; "
        "effective: exp of their entropy. The rank counts directions that can be reached at all, the effective one "
        "those that are reached about equally."
    ]


def _adapter_note(settings: Settings, groups: dict[tuple[str, str], list[Case]]) -> str:
    words = []
    for place in dict.fromkeys(place for place, _ in groups):
        parts = [
            f"{what} {own['gamma']:.2e} ({own['entries']:,.0f} entries, "
            f"{own['gamma per root of entries']:.1e} per root)"
            for what, own in ((what, summary(cases)) for (at, what), cases in groups.items() if at == place)
            if what in ("LoRA", "wide row", "wide column")
        ]
        words.append(f"{place}: {', '.join(parts)}")
    return (
        f"Gamma of a LoRA of rank {settings.lora_rank} at B = 0 (A uniform as PEFT draws it, scale 1) beside slices of "
        f"as many entries (Corollary D.3). {'; '.join(words)}. Entries of A are counted, but have no gradient at "
        "B = 0. A LoRA's gamma scales with its alpha / r, a slice's does not: the comparison holds for one scale."
    )


def _joint_note(settings: Settings, found: Measured) -> str:
    first = found.joints[0]
    ranks = sorted({own.change for own in found.joints})
    met = sum(own.change >= own.k for own in found.joints)
    return (
        f"Rows and columns together: a change in {settings.r} rows and {settings.r} columns has rank "
        f"{' or '.join(map(str, ranks))}, r_v + r_h at most; k_task({settings.tau:g}) is met in {met} of "
        f"{len(found.joints)} layers. Jacobians at the layer's output count otherwise: in {first.layer}, rows reach "
        f"{first.row:,}, columns {first.column:,}, both {first.both:,} of {first.outputs:,} outputs of one example, so "
        "r_v + r_h >= k_task bounds the rank of the change, not the directions of the output."
    )


def _pruning_notes(settings: Settings, found: Measured) -> list[str]:
    blocks = _blocks(found)
    if not blocks:
        return []
    counts = {block: falls([own.rank for own in rows]) for block, rows in blocks.items()}
    energy = {block: falls([-own.energy for own in rows]) for block, rows in blocks.items()}
    words = [
        f"{block}: {', '.join('-' if own.rank is None else str(own.rank) for own in rows)}"
        for block, rows in blocks.items()
    ]
    monotone = sum(count == 0 for count in counts.values())
    shares = ", ".join(f"{own.share:g}" for own in next(iter(blocks.values())))
    rows, columns = ([getattr(own, f"gamma_{axis}") for own in found.pruned] for axis in ("row", "column"))
    return [
        f"Pruning (Corollary D.2), p = {shares}: r*(p, {settings.tau:g}) is nondecreasing in {monotone} of "
        f"{len(blocks)} blocks, and E(p) nonincreasing in {sum(count == 0 for count in energy.values())}. r* by block, "
        f"{'; '.join(words)}.",
        f"At r = r*(p, tau) rows, gamma_p lies between {min(rows):.2e} and {max(rows):.2e}; a single column's "
        f"is the size of its input, between {min(columns):.2e} and {max(columns):.2e}.",
    ]


# -- charts -----------------------------------------------------------------------------------------------------------


def _overlap_chart(groups: dict[tuple[str, str], list[Case]]) -> Chart:
    panels, words = [], []
    for place in dict.fromkeys(place for place, _ in groups):
        lines = []
        for what in ("row", "column", "LoRA"):
            cases = [case for case in groups[place, what] if case.gamma > 0 and case.beta > 0]
            if cases:
                lines.append(Line(what, [case.gamma for case in cases], [case.beta for case in cases], style="points"))
            words.append(f"{place}, {what}: gamma above zero in {len(cases)} of {len(groups[place, what])}")
        if lines:
            ends = [end([value for line in lines for value in line.y]) for end in (min, max)]
            lines.append(Line("beta = gamma", ends, ends))
            panels.append(Panel(place, lines, "gamma", "beta", log_x=True, log_y=True))
    text = f"The premise holds below the diagonal. {'; '.join(words)}."
    return Chart("overlap_premise", "Overlap with the task subspace and beside it", panels, text)


def _span_chart(found: Measured, settings: Settings) -> Chart:
    panels, words = [], []
    for name in ("rank", "effective") if found.spans else ():
        lines = [
            Line(what, list(range(1, len(spans) + 1)), [float(getattr(own, name)) for own in spans])
            for what, spans in found.spans.items()
        ]
        outputs = next(iter(found.spans.values()))[0].outputs
        panels.append(Panel(name, lines, "slices m", f"{name} dimension", levels={"outputs": float(outputs)}))
        words.append(f"{name}: " + ", ".join(f"{line.label} {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines))
    text = f"Dimension of the span by the number of slices. {'; '.join(words)}."
    return Chart("overlap_span", "Span of the logits' Jacobians (equation 5)", panels, text)


def _pruning_chart(found: Measured) -> Chart:
    blocks = _blocks(found)
    panels = []
    for name, label in (("energy", "E(p)"), ("rank", "r*(p, tau)"), ("gamma_row", "gamma_p, r* rows")):
        lines = []
        for block, rows in blocks.items():
            values = [getattr(own, name) for own in rows]
            lines.append(
                Line(block, [own.share for own in rows], [math.nan if v is None else float(v) for v in values])
            )
        if lines:
            panels.append(Panel(label, lines, "share pruned", label))
    words = [
        f"{panel.title} {line.y[0]:.3g} to {line.y[-1]:.3g} in {line.label}" for panel in panels for line in panel.lines
    ]
    return Chart("overlap_pruning", "A pruned backbone (Corollary D.2)", panels, f"{'; '.join(words)}.")
