"""Publish an adapter on the Hugging Face hub, with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .parsing import VerbParser, instantiate

__all__ = ["PushSettings", "parser", "run"]

_EXAMPLES = (
    "slicefine push --adapter runs/mrpc/adapter --repository me/mrpc-slices --base them/model --license apache-2.0",
)


@dataclass
class PushSettings:
    """Everything that `slicefine push` needs. A token comes from `hf auth login` or the variable HF_TOKEN.

    Args:
        adapter: the adapter's folder.
        repository: user/name on the hub; it is created if it is not there.
        base: the base model's name on the hub, where training knew it by a folder of this machine.
        license: identifier for the model card, such as apache-2.0.
        private: create the repository as a private one.
    """

    adapter: str
    repository: str
    base: str | None = None
    license: str | None = None
    private: bool = False


def parser() -> VerbParser:
    """Options of `slicefine push`."""
    usage = "slicefine push --adapter DIR --repository USER/NAME [--base NAME] [--license ID] [--private]"
    result = VerbParser(usage, "Publish an adapter on the Hugging Face hub, with a model card.", _EXAMPLES)
    result.add_class_arguments(PushSettings)
    return result


def run(chosen: Any) -> Any:
    """Publish it, and say where it is."""
    from ..files.hub import push

    settings = PushSettings(**instantiate(parser(), chosen))
    url = push(
        settings.adapter,
        settings.repository,
        base=settings.base,
        license=settings.license,
        private=settings.private,
    )
    print(f"published: {url}")
    return {"url": url}
