"""Show what an adapter holds; its base is needed for distances only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .parsing import VerbParser, instantiate

__all__ = ["InfoSettings", "parser", "run"]

_EXAMPLES = (
    "slicefine info runs/mrpc/adapter",
    "slicefine info runs/mrpc/adapter --layers --distance --picture mrpc.png",
)


@dataclass
class InfoSettings:
    """What `slicefine info` shows.

    Args:
        layers: list every layer's positions.
        distance: read the base, too, and say how far each slice went from it.
        picture: file for a picture of every layer's rows and columns (PNG).
        model: the base, if it is elsewhere than in training: a folder, or a name on the Hugging Face hub.
    """

    layers: bool = False
    distance: bool = False
    picture: str | None = None
    model: str | None = None


def parser() -> VerbParser:
    """Options of `slicefine info`."""
    usage = "slicefine info DIR [--layers] [--distance] [--picture FILE.png]"
    result = VerbParser(usage, "Show what an adapter holds, and how far its slices went.", _EXAMPLES)
    result.add_argument("adapter", type=str, help="Adapter folder (adapter_config.json, adapter_model.safetensors).")
    result.add_class_arguments(InfoSettings)
    return result


def run(chosen: Any) -> Any:
    """Print the tables, and draw the picture."""
    from ..training.contents import print_contents, print_layers, read_contents

    plain = instantiate(parser(), chosen)
    folder = plain.pop("adapter")
    settings = InfoSettings(**plain)
    contents = read_contents(folder)
    facts: dict[str, Any] = {"folder": str(contents.folder), "config": contents.config, "layers": contents.layers}
    facts |= {"others": contents.others, "file_bytes": contents.file_bytes}
    print_contents(contents)
    if not (settings.layers or settings.picture or settings.distance):
        return facts
    from ..files.adapter import read_adapter

    adapter = read_adapter(folder)
    found = None
    if settings.distance:
        from ..files.distance import distances
        from ..training.bases import open_base

        with open_base(adapter, settings.model) as base:
            found = distances(adapter, base)
    if settings.layers or settings.distance:
        print_layers(contents, found)
    if settings.picture is not None:
        from ..plots import draw_layers

        _draw(settings.picture, lambda path: draw_layers(path, adapter, found))
        print(f"picture written to {settings.picture}")
    if found is not None:
        facts["distance"] = {
            layer: [{"slice": block, "distance": item} for block, item in own.items()] for layer, own in found.items()
        }
    return facts


def _draw(name: str, draw: Any) -> None:
    from pathlib import Path

    from ..errors import ConfigError

    try:
        draw(Path(name).expanduser())
    except (OSError, ValueError) as error:
        raise ConfigError(f"picture={name!r} cannot be written ({error}). Choose a .png file that can be.") from error
