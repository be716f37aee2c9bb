"""Write a plain checkpoint: the base with a trained adapter's values in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .parsing import VerbParser, instantiate

__all__ = ["MergeSettings", "parser", "run"]

_EXAMPLES = ("slicefine merge --adapter runs/mrpc/adapter --output runs/mrpc/merged",)


@dataclass
class MergeSettings:
    """Everything that `slicefine merge` needs.

    Args:
        adapter: the adapter folder that `slicefine train` wrote.
        output: folder of the checkpoint.
        model: the base, if it is elsewhere than in training.
        overwrite: replace what is in the output folder.
        trust_remote_code: run model code that comes with the base; the adapter's own files cannot say so.
    """

    adapter: str
    output: str
    model: str | None = None
    overwrite: bool = False
    trust_remote_code: bool = False


def parser() -> VerbParser:
    """Options of `slicefine merge`."""
    usage = "slicefine merge --adapter DIR --output DIR [--SETTING VALUE ...]"
    result = VerbParser(usage, "Write base and adapter as one plain Hugging Face checkpoint.", _EXAMPLES)
    result.add_class_arguments(MergeSettings)
    return result


def run(chosen: Any) -> Any:
    """Merge and say where the checkpoint is."""
    from ..training.evaluate import merge
    from ..training.screen import quiet_libraries

    quiet_libraries()
    settings = MergeSettings(**instantiate(parser(), chosen))
    folder = merge(settings.adapter, settings.output, settings.model, settings.overwrite, settings.trust_remote_code)
    print(f"written to {folder}")
    return {"output": str(folder)}
