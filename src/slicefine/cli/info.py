"""Show what an adapter holds, without loading its base."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """Options of `slicefine info`."""
    result = ArgumentParser(description="Show what an adapter holds, without loading its base.")
    result.add_argument("adapter", type=str, help="Adapter folder (adapter_config.json, adapter_model.safetensors).")
    return result


def run(chosen: Any) -> int:
    """Print the tables."""
    from ..training.contents import print_contents, read_contents

    print_contents(read_contents(chosen.adapter))
    return 0
