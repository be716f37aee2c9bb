"""Put several adapters of one base together, and say where they meet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .parsing import VerbParser, instantiate

__all__ = ["ComposeSettings", "parser", "run"]

_SHOWN = 8  # layers

_EXAMPLES = ("slicefine compose runs/a/adapter runs/b/adapter --output both",)


@dataclass
class ComposeSettings:
    """Everything that `slicefine compose` needs.

    Args:
        adapters: folders of SliceFine adapters of one base model, at least two.
        output: folder of the composed adapter; null only reports where they meet.
        policy: for entries that several changed: refuse, sum (of the changes), last (adapter's value) or mean (of the
            changes).
        weights: of mean, one per adapter; null takes equal ones.
        head: folder of the adapter whose other tensors (a classification head) the result gets, one of the adapters.
        model: the base model, if it is elsewhere than in training: a folder, or a name on the Hugging Face hub.
        overwrite: replace what is in the output folder.
    """

    adapters: list[str]
    output: str | None = None
    policy: str = "refuse"
    weights: list[float] | None = None
    head: str | None = None
    model: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.head is not None and self.head not in self.adapters:
            raise ConfigError(f"head={self.head!r} is none of the adapters, {', '.join(self.adapters)}.")


def parser() -> VerbParser:
    """Options of `slicefine compose`."""
    usage = "slicefine compose DIR DIR ... [--output DIR] [--policy sum] [--SETTING VALUE ...]"
    result = VerbParser(usage, "Put adapters together that were trained on one base model.", _EXAMPLES)
    result.add_argument("adapters", type=str, nargs="+", help="Folders of SliceFine adapters of one base model.")
    result.add_class_arguments(ComposeSettings, skip={"adapters"})
    return result


def _ranges(lines: list[int]) -> str:
    """Line numbers as ranges: ``0-4, 9``.

    Example:
        >>> _ranges([0, 1, 2, 7])
        '0-2, 7'
    """
    found: list[list[int]] = []
    for line in lines:
        if found and line == found[-1][1] + 1:
            found[-1][1] = line
        else:
            found.append([line, line])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found) or "none"


def run(chosen: Any) -> Any:
    """Report where the adapters meet, and write the composed one."""
    from ..files.adapter import read_adapter, write_adapter
    from ..files.compose import compose, overlaps
    from ..files.writing import check_target
    from ..training.bases import open_base
    from ..training.screen import quiet_libraries

    quiet_libraries()
    settings = ComposeSettings(**instantiate(parser(), chosen))
    adapters = [read_adapter(folder) for folder in settings.adapters]
    found = overlaps(adapters)
    bases = list(dict.fromkeys(str(adapter.config.get("base_model_name_or_path")) for adapter in adapters))
    if len(bases) > 1:
        print(f"note: they name different base models, {', '.join(bases)}; only adapters of one base go together")
    for (first, second), layers in Counter((o.first, o.second) for o in found).items():
        pair = [o for o in found if (o.first, o.second) == (first, second)]
        lines, crossings = sum(len(o.rows) + len(o.columns) for o in pair), sum(o.crossings for o in pair)
        print(f"{settings.adapters[first]} and {settings.adapters[second]} meet in {layers} layers: {lines:,} common")
        print(f"rows and columns, {crossings:,} entries where rows of one cross columns of the other")
        for overlap in sorted(pair, key=lambda o: -o.crossings)[:_SHOWN]:
            rows, columns = _ranges(overlap.rows), _ranges(overlap.columns)
            print(f"  {overlap.layer}: rows {rows}; columns {columns}; {overlap.crossings:,} crossings")
        if len(pair) > _SHOWN:
            print(f"  ... and {len(pair) - _SHOWN} more layers")
    if not found:
        common = set.intersection(*(set(adapter.layers) for adapter in adapters))
        print(f"the adapters touch no common entry{'' if common else ': they have no layer in common'}")
    met = [{"first": o.first, "second": o.second, "layer": o.layer, "crossings": o.crossings} for o in found]
    if settings.output is None:
        return {"meet": met, "output": None}
    head = None if settings.head is None else settings.adapters.index(settings.head)
    with open_base(adapters[0], settings.model) as base:
        sources = [base.folder, *(adapter.folder for adapter in adapters)]
        target = check_target(settings.output, sources, settings.overwrite)
        composed = compose(adapters, base, settings.policy, settings.weights, head)
        write_adapter(composed, target, beside=adapters[head or 0].folder)
    print(f"written to {target}")
    return {"meet": met, "output": str(target)}
