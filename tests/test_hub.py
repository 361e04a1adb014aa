"""The Hub, by the real client over HTTP: what is pushed, how it comes back, and that nobody asks it without need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import hub_client
import pytest
import yaml
from case import declared
from hub_client import CLASSES, OWNER, REPOSITORIES, STAGES
from hub_server import Hub

TESTS = Path(__file__).parent


def stage(name: str, folder: Path, home: Path, **environment: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "hub_client.py"), name, str(folder)],
        env={**clean, **settings}, capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub(tokens={OWNER: "owner", hub_client.STRANGER: "stranger"}) as server:
        yield server


@pytest.fixture(scope="module")
def results(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What each stage says of its steps: the owner publishes, another machine uses, then loses its network."""
    folder, theirs = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("home")
    found = {
        "publish": stage("publish", folder, tmp_path_factory.mktemp("owner"), HF_ENDPOINT=hub.url, HF_TOKEN=OWNER),
        "use": stage("use", folder, theirs, HF_ENDPOINT=hub.url),
    }
    before = len(hub.requests)
    found["offline"] = stage("offline", folder, theirs, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before, "offline asks nobody"
    return found


@pytest.mark.parametrize(("which", "name"), [(s, name) for s in ("publish", "use", "offline") for name in STAGES[s]])
def test_step(which: str, name: str, results: dict[str, dict[str, str]]):
    assert results[which][name] == "", results[which][name]


def test_nothing_asks_the_network_when_all_is_local(tmp_path: Path):
    found = stage("local", tmp_path, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert found == dict.fromkeys(STAGES["local"], ""), "\n".join(found.values())


def test_only_the_named_encoder_is_asked_for(hub: Hub, tmp_path: Path):
    before = len(hub.requests)
    found = stage("fields", tmp_path, tmp_path / "home", HF_ENDPOINT=hub.url)
    assert found == dict.fromkeys(STAGES["fields"], ""), "\n".join(found.values())
    asked = hub.requests[before:]
    assert asked
    assert all("stranger/repository" in request for request in asked)


def front(hub: Hub, repository: str) -> tuple[dict, str]:
    _, metadata, text = hub.files(repository)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


@pytest.mark.parametrize("method", REPOSITORIES)
def test_what_is_published(method: str, hub: Hub, results: dict):
    files = hub.files(REPOSITORIES[method])
    ours = {"adapter_config.json", "adapter_model.safetensors", "README.md"} | declared()[method].promises.companions
    assert set(files) == ours | {".gitattributes"}
    metadata, text = front(hub, REPOSITORIES[method])
    base = f"owner/tiny-{hub_client.home(method).name.replace('_', '-')}"
    assert metadata["base_model"] == base
    assert metadata["library_name"] == "peft"
    assert {"peft-multimodal", f"base_model:adapter:{base}", method.replace("_", "-")} <= set(metadata["tags"])
    assert metadata["license"] == "apache-2.0"
    measured = metadata["model-index"][0]["results"][0]
    assert measured["dataset"]["type"] == "owner/emoji"
    assert {m["name"]: m["value"] for m in measured["metrics"]} == hub_client.METRICS
    for line in (f"| base model | `{base}` (", "| towers | ", "| parameters | ", "| mean recall | 23.04 |"):
        assert line in text
    assert f"| method | {method.title().replace('_', '')} |".lower() in text.lower()


def test_languages_and_classes_are_on_the_card(hub: Hub, results: dict):
    metadata, text = front(hub, "owner/languages")
    assert metadata["language"] == ["ja", "zh"] or metadata["language"] == ["zh", "ja"]
    assert "2 adapters for `owner/tiny-clip`" in text
    assert "| method | `zh`: CrossLingualAdapter |" in text
    _, text = front(hub, REPOSITORIES["structured_prompt"])
    assert f'| {len(CLASSES)} classes | w4 w5, w6, w7 "w8" \\| w9 |' in text


def test_weights_went_through_lfs_and_came_back_so(hub: Hub, results: dict):
    repository = hub.repositories[REPOSITORIES["aurora_mode_approx"]]
    files = repository.commits[repository.branches["main"]]
    assert {path: file.is_large for path, file in files.items()} == {
        ".gitattributes": False,
        "README.md": False,
        "adapter_config.json": False,
        "adapter_model.safetensors": True,
    }
    weights = files["adapter_model.safetensors"].sha256
    assert f"PUT /lfs/{weights}" in hub.requests
    assert f"GET /cdn/{weights}" in hub.requests


def test_a_card_with_a_local_path_would_be_refused(hub: Hub, results: dict):
    """The server is as strict as the Hub: what the card leaves out, it leaves out for a reason."""
    card = json.dumps({"repoType": "model", "content": "---\nbase_model: /home/me/model\n---\n"}).encode()
    with pytest.raises(HTTPError, match="400"):
        urlopen(f"{hub.url}/api/validate-yaml", data=card)
