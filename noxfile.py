"""The whole test suite with the oldest and with the newest versions of what SliceFine stands on.

pip install nox
nox                       # both: about 10 GB of environments where PyPI's builds of torch bring CUDA
nox -s "tests(oldest)" -- tests/test_layer.py
"""

from __future__ import annotations

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"

TOOLS = ["hypothesis", "parameterized", "pytest", "pytest-xdist", "pytorch-cka", "tensorboard"]
VERSIONS = {
    # the lower bounds of pyproject.toml
    "oldest": [
        "torch==2.6.0",
        "accelerate==1.7.0",
        "av==14.0.0",
        "datasets==3.0.0",
        "jsonargparse[signatures]==4.40.0",
        "matplotlib==3.9.0",
        "peft==0.21.0",
        "pillow==11.0.0",
        "pyyaml==6.0.1",
        "rich==13.9.0",
        "safetensors==0.5.0",
        "scikit-learn==1.5.0",
        "scipy==1.13.0",
        "transformers==5.0.0",
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
