"""The doctor: what it sees in a model and in an adapter, its exit code, and a way out for everything that is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from case import declared
from families import FAMILIES
from methods import CASES, METHODS, home, wrap
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_multimodal import __main__ as command
from peft_multimodal.core import registry
from peft_multimodal.doctor import examine

CLIP = FAMILIES["clip"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    CLIP.build().save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # the config is enough
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    wrap(CLIP, "aurora_mode_approx").save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def run(capsys: pytest.CaptureFixture, *arguments: Any) -> tuple[int, str]:
    code = command.main(["doctor", *map(str, arguments)])
    return code, capsys.readouterr().out


def problem(base: Any, folder: Any) -> Any:
    report = examine(base, folder)
    assert not report.healthy
    (found,) = [f for f in report.findings if f.level == "problem"]
    assert found.way_out
    return found


# ----------------------------------------------------------------------------------------------------------- in order


def test_a_model(clip: Path, capsys):
    code, text = run(capsys, clip)
    assert code == 0
    for line in (
        "CLIPModel",
        "vision  vision_model",
        "AuroraModeApprox: ",
        "2 x text q",
        "GatedXAttn: no. ",
        "healthy",
    ):
        assert line in text


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_fits(method: str, tmp_path: Path, capsys):
    family = home(method)
    family.build().save_pretrained(tmp_path / "base")
    wrap(family, method).save_pretrained(tmp_path / "adapter")
    code, text = run(capsys, tmp_path / "base", tmp_path / "adapter", "--json")
    report = json.loads(text)
    assert (code, report["healthy"], report["findings"]) == (0, True, [])
    assert report["adapter"]["fits"] is True
    assert set(report["methods"]) == {found.title for found in registry.METHODS.values()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_looked_at(name: str):
    report = examine(FAMILIES[name].build())
    assert report.healthy
    assert {tower["name"] for tower in report.towers}
    for case in (declared()[method] for method in registry.METHODS):
        found = report.methods[case.method.title]
        if (name, case.name) in CASES:
            assert found["fits"], found
        elif (
            "vision" in FAMILIES[name].towers and case.promises.acts_on != "decoder"
        ):  # else some fit that are no cases
            assert not found["fits"]
            assert case.refusal in found["reason"]


def test_by_the_command_line(clip: Path, adapter: Path):
    change(adapter, peft_type="NONSENSE")
    arguments = [sys.executable, "-m", "peft_multimodal", "doctor", str(clip), str(adapter), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "names the method 'NONSENSE'" in json.loads(done.stdout)["findings"][0]["what"]


def test_a_subfolder(clip: Path, tmp_path: Path, capsys):
    wrap(CLIP, "aurora_mode_approx", adapter_name="other").save_pretrained(tmp_path)
    assert run(capsys, clip, tmp_path, "--subfolder", "other")[0] == 0
    assert run(capsys, clip, tmp_path)[0] == 1


# ---------------------------------------------------------------------------------------------------------- in trouble


def test_a_model_that_is_none(tmp_path: Path):
    assert "is no model that transformers can read" in problem(tmp_path / "nothing", None).what
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    assert "nonsense" in problem(tmp_path, None).what


def test_a_model_without_towers():
    report = examine(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert "has no tower" in report.findings[0].what


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": None}, "has no peft_type"),
        ({"peft_type": "NONSENSE"}, "names the method 'NONSENSE'"),
        ({"format_version": 99, "package_version": "9.9"}, "format 99, written by peft_multimodal 9.9.*Upgrade"),
        ({"r": -1}, "AuroraModeApproxConfig.r must be an integer >= 1"),
        ({"r": 3}, "The adapter doesn't fit: .*has shape"),
        ({"use_gqt": True}, "doesn't fit"),
        (
            {"base_signature": {"towers": {"vision": 3}, "roles": 5}},
            "base_signature must be a dictionary with {tower: ",
        ),
    ],
)
def test_a_config_that_is_wrong(fields: dict, message: str, clip: Path, adapter: Path):
    change(adapter, **fields)
    found = problem(clip, adapter)
    assert re.search(message, found.what), found.what


@pytest.mark.parametrize("damage", ["missing", "extra", "nan", "truncated", "none"])
def test_weights_that_are_wrong(damage: str, clip: Path, adapter: Path):
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    first = min(weights)
    if damage == "missing":
        del weights[first]
    elif damage == "extra":
        weights["base_model.model.vision.q.77.aurora_mode_approx_P_norm"] = torch.zeros(4)
    elif damage == "nan":
        weights[first] = weights[first] * float("nan")
    save_file(weights, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:200])
    elif damage == "none":
        file.unlink()
    expected = {"missing": "missing: ", "extra": "not of this adapter: vision.q.77", "nan": "holds NaN",
                "truncated": "damaged or truncated", "none": "has no adapter_model.safetensors"}  # fmt: skip
    assert expected[damage] in problem(clip, adapter).what


def test_folders_that_are_no_adapters(clip: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory):
    def found(place: Path, **kwargs: str) -> tuple[str, str]:
        (finding,) = examine(clip, place, **kwargs).findings
        assert finding.level == "problem"
        return finding.what, finding.way_out

    folder = tmp_path_factory.mktemp("folders")
    assert found(folder) == (
        f"{folder} has no adapter_config.json: it is no adapter folder, or its save was interrupted.",
        "Name the folder that an adapter was saved to, or save it again.",
    )
    file = adapter / "adapter_model.safetensors"
    assert found(file) == (f"{file} is a file, and an adapter is a folder.", f"Name the folder: {adapter}")
    assert found(adapter, subfolder="nope")[0] == f"The folder {adapter} has no subfolder 'nope'."
    for name in ("ja", "zh"):
        shutil.copytree(adapter, folder / name)
    assert found(folder, subfolder="nope")[1] == "There are adapters in ja, zh."
    assert found(folder)[0].endswith("but there are adapters in its subfolders: ja, zh.")
    assert found(folder)[1] == "Name one: subfolder='ja', or --subfolder ja on the command line."
    file.rename(adapter / "adapter_model.bin")
    assert found(adapter)[0].endswith("has no adapter_model.safetensors; other formats are not loaded.")
    assert found(adapter)[1].startswith("There is adapter_model.bin: ")


@pytest.mark.parametrize("config", [{"model_type": ["clip"]}, {"model_type": "clip", "text_config": 5}, [], 3])
def test_a_base_config_that_makes_no_sense(config: Any, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "is no model that transformers can read" in problem(tmp_path, None).what


@pytest.mark.parametrize("named", [["pipeline"], ["CLIPTokenizer"], ["MyOwnCLIP"], [5], [[]], "CLIP"])
def test_a_class_that_is_no_model(named: Any, clip: Path, tmp_path: Path, monkeypatch):
    """It is not called, and another one isn't taken for it without a word."""
    called: list[Any] = []
    monkeypatch.setattr(transformers, "pipeline", lambda *a, **k: called.append(a))
    written = json.loads((clip / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "architectures": named}))
    report = examine(tmp_path)
    (found,) = report.findings
    assert (found.level, report.model, called) == ("warning", "CLIPModel", [])
    assert (
        f"architectures name {(named if isinstance(named, str) else named[0])!r}, which is no model class" in found.what
    )
    assert found.way_out


def test_another_base(adapter: Path, tmp_path: Path):
    change(adapter, base_model_name_or_path="user/clip")
    found = problem(FAMILIES["llava"].build(), adapter)
    assert "belongs to another base" in found.what
    assert found.way_out == "It was trained on 'user/clip'."


def test_newer_packages_are_a_warning(clip: Path, adapter: Path):
    change(adapter, peft_version="99.0", package_version="98.0")
    report = examine(clip, adapter)
    assert report.healthy
    assert [f.level for f in report.findings] == ["warning", "warning"]
    assert "saved with peft 99.0, which is newer" in report.findings[0].what
    assert report.findings[1].way_out == "pip install . in newer sources of peft-multimodal"


def test_wrong_versions(clip: Path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["peft>=99", "nothing-of-the-kind>=1"])
    monkeypatch.setattr("peft_multimodal.doctor.CHECKED", ("peft", "nothing-of-the-kind"))
    found = examine(clip).findings
    assert [f.way_out for f in found] == ['pip install -U "peft>=99"', 'pip install "nothing-of-the-kind>=1"']


def test_an_adapter_of_pefts_own(clip: Path, tmp_path: Path):
    get_peft_model(CLIP.build(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    report = examine(clip, tmp_path)
    assert report.healthy
    assert "adapter of LORA" in report.findings[0].what


def test_a_tower_that_is_frozen_by_accident():
    model = wrap(CLIP, "hard_sample_domain_adapter")
    assert not examine(model).findings
    for name, parameter in model.named_parameters():
        if "text_model" in name:
            parameter.requires_grad_(False)
    (found,) = examine(model).findings
    assert (found.level, found.what) == (
        "warning", "In the text tower no parameter of adapter 'default' trains, elsewhere they do."
    )  # fmt: skip
    model.requires_grad_(False)
    assert "No parameter of adapter 'default' trains" in examine(model).findings[0].what


def test_the_model_in_memory_is_left_alone(adapter: Path):
    model = CLIP.build()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert examine(model, adapter).healthy
    assert {n: p.requires_grad for n, p in model.named_parameters()} == dict.fromkeys(before, True)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("method", ["aurora_mode_approx", "structured_prompt"])
def test_a_model_whose_last_adapter_was_deleted(method: str):
    model = wrap(FAMILIES["clip"], method)
    model.delete_adapter("default")
    report = examine(model)
    assert report.healthy
    assert report.adapters == {}
    assert report.model == "CLIPModel"
