"""The whole test suite with the oldest and with the newest versions of what SliceFine stands on; packaging; an audit.

pip install nox
nox                       # both: about 10 GB of environments where PyPI's builds of torch bring CUDA
nox -s "tests(oldest)" -- tests/test_layer.py
nox -s package            # wheel and source distribution, reproducible and checked, in dist/
nox -s base               # the package without extras
nox -s audit              # known vulnerabilities of the lock
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"

TOOLS = ["hypothesis", "parameterized", "pytest", "pytest-xdist", "pytorch-cka", "tensorboard"]
VERSIONS = {
    # the lower bounds of the extra `train` (docs/results/tests.md)
    "oldest": [
        "torch==2.9.1",
        "accelerate==1.10.0",
        "av==14.0.0",
        "datasets==5.2.0",
        "jsonargparse[signatures]==4.50.0",
        "matplotlib==3.10.8",
        "peft==0.21.2",
        "pillow==11.0.0",
        "pyyaml==6.0.1",
        "rich==13.9.0",
        "scikit-learn==1.7.0",
        "scipy==1.15.0",
        "transformers==5.20.0",
    ],
    # the newest that were run
    "newest": ["torch==2.14.1", "accelerate==1.15.0", "peft==0.21.2", "transformers==5.24.0"],
}


@nox.session
@nox.parametrize("versions", list(VERSIONS), ids=list(VERSIONS))
def tests(session: nox.Session, versions: str) -> None:
    """Install the versions, then the package without its pins, and run the tests."""
    session.install(*VERSIONS[versions])
    session.install("-e", ".[demo,video]", *VERSIONS[versions], *TOOLS)
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs, env=offline)


@nox.session
def package(session: nox.Session) -> None:
    """Build wheel and source distribution twice, compare them bit for bit, and check them; dist/ can be published."""
    session.install("build==1.6.1", "twine==7.0.0", "hatchling==1.33.0")
    environment = {
        "SOURCE_DATE_EPOCH": session.run("git", "log", "-1", "--format=%ct", silent=True, external=True).strip()
    }
    builds = [Path("dist"), Path(session.create_tmp()) / "again"]
    for folder in builds:
        shutil.rmtree(folder, ignore_errors=True)
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder), env=environment)
    first, second = (
        {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()} for folder in builds
    )
    if first != second:
        session.error(f"two builds of the same sources differ: {first} and {second}")
    session.log(f"the same twice: {first}")
    session.run("twine", "check", "--strict", *map(str, builds[0].iterdir()))


@nox.session
def base(session: nox.Session) -> None:
    """The wheel without any extra: it imports, and the command line says in one sentence what to install."""
    session.install("-r", "requirements/torch.txt", ".")
    session.run("python", "-c", "import slicefine; slicefine.attach")
    session.run("slicefine", "--help", success_codes=[2])


@nox.session
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of the lock and of torch; asks PyPI for advisories, and fails where it gets no answer."""
    session.install("pip-audit==2.10.1")
    session.run(
        "pip-audit", "--strict", "--disable-pip", "--require-hashes", "-r", "requirements/dev.txt", *session.posargs
    )
    session.run("pip-audit", "--strict", "--disable-pip", "--no-deps", "-r", "requirements/torch.txt", *session.posargs)
