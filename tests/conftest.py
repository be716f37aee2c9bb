"""Settings for every test: reproducible examples, no time limits, one seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("slicefine", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("slicefine")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
