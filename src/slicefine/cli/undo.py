"""Take the last moves, or one position, out of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .parsing import VerbParser, instantiate

__all__ = ["UndoSettings", "parser", "run"]

_EXAMPLES = ("slicefine undo --adapter runs/mrpc/adapter --output runs/mrpc/earlier --moves 2",)


@dataclass
class UndoSettings:
    """Everything that `slicefine undo` needs.

    Args:
        adapter: the adapter's folder; it stays as it is.
        output: folder of the new adapter.
        moves: how many of the last visits to take back; 1 if neither this nor position is given.
        position: take back this visit only, counted from 1; entries that later visits trained, too, stay.
        overwrite: replace what is in the output folder.
    """

    adapter: str
    output: str
    moves: int | None = None
    position: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.moves is not None and self.position is not None:
            raise ConfigError("undo: give moves (the last visits) or position (a single one), not both.")


def parser() -> VerbParser:
    """Options of `slicefine undo`."""
    usage = "slicefine undo --adapter DIR --output DIR [--moves N | --position N] [--SETTING VALUE ...]"
    about = "Take the last moves, or one position, out of an adapter; the base model is not needed."
    result = VerbParser(usage, about, _EXAMPLES)
    result.add_class_arguments(UndoSettings)
    return result


def run(chosen: Any) -> Any:
    """Write the adapter without them, and say what is left."""
    from ..files.adapter import read_adapter, write_adapter
    from ..files.undo import drop, undo
    from ..files.writing import check_target

    settings = UndoSettings(**instantiate(parser(), chosen))
    adapter = read_adapter(settings.adapter)
    target = check_target(settings.output, [adapter.folder], settings.overwrite)
    if settings.position is not None:
        left = drop(adapter, settings.position - 1)
    else:
        left = undo(adapter, 1 if settings.moves is None else settings.moves)
    write_adapter(left, target, beside=adapter.folder)
    visits = max(len(layer.visits) for layer in left.layers.values())
    print(f"written to {target}: {visits} {'position' if visits == 1 else 'positions'} left")
    if adapter.others:
        print(f"{len(adapter.others)} other tensors (a head) are as they were at the end of training")
    return {"output": str(target), "positions": visits}
