"""Coverage-guided fuzzing of one target with atheris; see README.md here.

    python fuzz/run.py adapter --seconds 1200

Runs on the committed corpus and a working copy, stops at the first input that lets anything but a `SliceFineError` out,
and writes what it did beside the other targets' results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results" / "fuzzing.json"
MEMORY = 3 * 2**30  # bytes beyond what the libraries take: more address space is refused


def main() -> int:
    """Start the fuzzer in a process of its own, which libFuzzer ends, and record what it says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=("adapter", "config", "recipe"))
    parser.add_argument("--seconds", type=int, default=1200)
    parser.add_argument("--corpus", type=Path, help="Working copy that grows; a temporary folder by default.")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        return fuzz(chosen.target, chosen.corpus, chosen.seconds)
    corpus = chosen.corpus or Path(tempfile.mkdtemp(prefix=f"fuzz-{chosen.target}-"))
    corpus.mkdir(parents=True, exist_ok=True)
    words = [
        sys.executable,
        __file__,
        chosen.target,
        "--seconds",
        str(chosen.seconds),
        "--corpus",
        str(corpus),
        "--inside",
    ]
    began = time.monotonic()
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False, cwd=corpus)
    record(chosen.target, done.stderr, done.returncode, time.monotonic() - began, corpus)
    print(done.stderr[-3000:], file=sys.stderr)
    return done.returncode


def fuzz(target: str, corpus: Path, seconds: int) -> int:
    """Inside: instrument slicefine, load the target, and hand over to libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["slicefine"]):
        import slicefine.cli.sweep
        import slicefine.cli.train
        import slicefine.files.compose
        import slicefine.files.undo
        import slicefine.sweeps.paper
        import slicefine.training.contents  # noqa: F401
    sys.path.insert(0, str(HERE))
    import mutators
    import targets

    used = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.8:
            try:
                changed = mutators.mutate(target, data, draw)
            except Exception:  # not well formed any more: change bytes
                changed = b""
            if changed and len(changed) <= largest:
                return changed
        return bytes(atheris.Mutate(data, largest))

    options = ["-timeout=20", "-rss_limit_mb=6000", "-max_len=16384", "-print_final_stats=1"]
    seeds = str(HERE / "corpus" / target)
    options += [f"-max_total_time={seconds}", str(corpus), seeds]
    atheris.Setup([sys.argv[0], *options], targets.TARGETS[target], custom_mutator=mutate)
    atheris.Fuzz()
    return 0


def record(target: str, said: str, status: int, seconds: float, corpus: Path) -> None:
    """Put a target's figures into the results."""
    coverage = re.findall(r"cov: (\d+) ft: (\d+)", said)
    inputs = re.findall(r"number_of_executed_units:\s*(\d+)", said) or re.findall(r"#(\d+)\s", said)[-1:]
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found[target] = {
        "command": f"python fuzz/run.py {target} --seconds {round(seconds)}",
        "date": date.today().isoformat(),
        "seconds": round(seconds),
        "inputs": int(inputs[0]) if inputs else 0,
        "crashes": int(status != 0),
        "coverage at the start and the end (edges of slicefine)": [int(coverage[i][0]) for i in (0, -1)]
        if coverage
        else [],
        "features": int(coverage[-1][1]) if coverage else 0,
        "seeds": len(os.listdir(HERE / "corpus" / target)),
        "inputs kept": len(os.listdir(corpus)),
        "versions": {name: version(name) for name in ("atheris", "slicefine", "torch", "safetensors", "peft")}
        | {"python": platform.python_version()},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
