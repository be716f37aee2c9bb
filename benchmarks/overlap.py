"""Rows that a data set's splits share: leakage from train to validation or test.

A row counts as shared if its input texts are equal to those of a train row, letter case and white space aside.

    python benchmarks/overlap.py data/glue/sst2:sentence data/glue/mrpc:sentence1,sentence2 --out overlap.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from slicefine.tasks.settings import DataSettings
from slicefine.tasks.sources import load_splits


def shared_rows(path: str, columns: list[str]) -> dict[str, dict[str, int]]:
    """Rows of each split but train: how many there are, and how many of them are in train."""
    splits = load_splits(DataSettings(path, validation_fraction=0.0))
    keys = {
        name: [tuple(" ".join(str(row[column]).lower().split()) for column in columns) for row in rows]
        for name, rows in splits.items()
    }
    train = set(keys.pop("train"))
    return {name: {"rows": len(own), "in train": sum(key in train for key in own)} for name, own in keys.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folder:column[,column]")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    found = {}
    for item in args.data:
        path, _, columns = item.rpartition(":")
        found[path] = shared_rows(path, columns.split(","))
        print(path, found[path])
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
