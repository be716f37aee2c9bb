"""Publishing and fetching, against a hub of our own: each side in a process of its own, with the real client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model

from hub_stand_in import running_hub
from peft_helpers import IDS, THIRD_PARTY, config, llama, logits, train
from slicefine.errors import AdapterFileError, ConfigError
from slicefine.files.adapter import read_adapter
from slicefine.files.hub import model_card, push

pytestmark = THIRD_PARTY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's output: metrics beside an adapter whose base is a folder of this machine."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, config(target_modules=["q_proj"]))
    train(model, 4)
    model.save_pretrained(tmp_path / "run" / "adapter")
    torch.save(logits(model), tmp_path / "logits")
    report = {
        "after": {"validation": {"accuracy": 0.75, "loss": 0.5}},
        "settings": {"data": {"path": str(tmp_path / "secret" / "mrpc")}},
        "command": f"slicefine train --config recipes/mrpc.yaml --model.path {tmp_path}/base",
        "versions": {"slicefine": "0.2.0"},
        "device": "cpu",
    }
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(report))
    (tmp_path / "rows").mkdir()
    for name in (".env", "optimizer.pt", "training_args.bin"):
        (tmp_path / "run" / "adapter" / name).write_text("secret")
    run = {"model": {"path": str(tmp_path / "base")}, "data": {"path": str(tmp_path / "rows")}, "adapter": True}
    (tmp_path / "run" / "adapter" / "slicefine_run.json").write_text(json.dumps(run))
    return tmp_path / "run" / "adapter"


def elsewhere(tmp_path: Path, address: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A process that knows the hub by this address and has an empty cache."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | own, check=False)


LOAD = """
import sys
import torch
import slicefine
from peft import PeftModel
from transformers import LlamaForCausalLM
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(sys.argv[1]), "me/slices").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(24).reshape(3, 8) % 29).logits, sys.argv[2])
"""


def test_what_is_published_loads_by_its_name(tmp_path: Path, folder: Path):
    cli = [sys.executable, "-W", "ignore", "-c", "import sys; from slicefine.cli.main import main; sys.exit(main())"]
    with running_hub() as hub:
        words = ["push", "--adapter", str(folder), "--repository", "me/slices", "--base", "them/tiny-llama"]
        done = elsewhere(tmp_path, hub.address, *cli, *words, "--license", "apache-2.0", "--private")
        assert done.returncode == 0, done.stderr
        assert f"published: {hub.address}/me/slices/commit/" in done.stdout
        assert hub.private == {"me/slices"}
        files = hub.repositories["me/slices"]
        shown = elsewhere(tmp_path, hub.address, *cli, "info", "me/slices")
        assert shown.returncode == 0, shown.stderr
        assert "them/tiny-llama" in shown.stdout
        load = [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path / "base"), str(tmp_path / "out")]
        made = elsewhere(tmp_path, hub.address, *load)
        assert made.returncode == 0, made.stderr
    assert torch.equal(torch.load(tmp_path / "out"), torch.load(tmp_path / "logits"))
    assert torch.load(tmp_path / "out").shape[:2] == IDS.shape
    assert not any(str(tmp_path).encode() in content for content in files.values())  # no folder of this machine
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "slicefine_run.json"}
    card = files["README.md"].decode()
    meta = yaml.safe_load(card.split("---")[1])
    assert meta["license"] == "apache-2.0"
    assert meta["base_model"] == "them/tiny-llama"
    (result,) = meta["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"accuracy": 0.75, "loss": 0.5}
    assert "slicefine train --config recipes/mrpc.yaml --model.path base\n" in card
    assert "import slicefine" in card
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "them/tiny-llama"
    assert read_adapter(folder).config["base_model_name_or_path"] == str(tmp_path / "base")  # ours stays


def test_refusals_are_sentences(tmp_path: Path, folder: Path):
    with pytest.raises(ConfigError, match="expected user/name"):
        push(folder, "slices")
    with pytest.raises(ConfigError, match=r"its base model is '.*base', which nobody else can find"):
        push(folder, "me/slices")
    (folder.parent / "metrics.json").write_text('{"after": {}, "settings": {"data": 5}}')
    assert "## Metrics" not in model_card(read_adapter(folder), "gpt2", "me/slices")
    code = f"from slicefine.files.hub import push; push({str(folder)!r}, 'me/slices', base='them/tiny')"
    with running_hub() as hub:
        hub.refuse = True
        done = elsewhere(tmp_path, hub.address, sys.executable, "-W", "ignore", "-c", code)
        assert "ConfigError: repository='me/slices': the hub does not take it (" in done.stderr
        code = "from slicefine.files.adapter import read_adapter; read_adapter('me/nothing')"
        done = elsewhere(tmp_path, hub.address, sys.executable, "-W", "ignore", "-c", code)
        assert "AdapterFileError: me/nothing: no such folder, and the hub does not give it (" in done.stderr
    done = elsewhere(tmp_path, hub.address, sys.executable, "-W", "ignore", "-c", code)  # nobody listens any more
    assert "AdapterFileError: me/nothing: no such folder, and the hub does not give it (" in done.stderr
    with pytest.raises(AdapterFileError, match="nowhere"):
        read_adapter(tmp_path / "nowhere")
