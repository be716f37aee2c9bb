"""Run all of PEFT's tests that apply: ``python -m tests.peft_suite [--method lora] [pytest options]``.

``--method lora`` runs the same tests with stock LoRA, the yardstick for what a PEFT method has to pass.
"""

import argparse
import os
import sys
from pathlib import Path

import pytest


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("--method", choices=("slicefine", "lora"), default="slicefine")
    parser.add_argument("--smoke", action="store_true", help="only the subset that the default test run has")
    known, rest = parser.parse_known_args()
    os.environ["SLICEFINE_PEFT_METHOD"] = known.method
    os.environ["SLICEFINE_PEFT_FULL"] = "0" if known.smoke else "1"
    return int(pytest.main([str(Path(__file__).parent), *rest]))


if __name__ == "__main__":
    sys.exit(main())
