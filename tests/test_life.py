"""Old adapter files load, newer ones are refused clearly, and what is built of the package installs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from methods import METHODS, distance, home, run
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

import peft_multimodal
from peft_multimodal import load
from peft_multimodal.core.config import FORMAT_VERSION, TargetedConfig

ROOT = Path(__file__).parents[1]
RELEASED = Path(__file__).parent / "released"
OUTSIDE = {"gated_xattn-encoder"}  # its file names an encoder that isn't in the folder
ADAPTERS = sorted(f.parent.relative_to(RELEASED) for f in RELEASED.glob("*/*/adapter_config.json"))


def test_this_release_is_kept():
    release = ".".join(peft_multimodal.__version__.split(".")[:2])
    assert {p.name for p in ADAPTERS if p.parts[0] == release} == set(METHODS) - OUTSIDE, (
        "run PYTHONPATH=tests python tests/released/make.py"
    )
    assert sum(f.stat().st_size for f in RELEASED.rglob("*") if f.is_file()) < 1_000_000 * len(set(RELEASED.iterdir()))
    for folder in ADAPTERS:
        assert str(Path.home()) not in (RELEASED / folder / "adapter_config.json").read_text()


@pytest.mark.parametrize("by", [load, PeftModel.from_pretrained], ids=["load", "peft"])
@pytest.mark.parametrize("folder", ADAPTERS, ids=str)
def test_adapters_of_every_release_give_what_they_gave(folder: Path, by, tmp_path: Path):
    family = home(folder.name)
    expected = load_file(RELEASED / folder / "output.safetensors")["output"]
    shutil.copytree(RELEASED / folder, tmp_path / "adapter")
    model = by(family.build(), tmp_path / "adapter")
    assert distance(run(family, model), expected) <= 1e-4 * float(expected.abs().max())
    with model.disable_adapter():
        assert distance(run(family, model), expected) > 1e-4


@pytest.mark.parametrize("folder", ADAPTERS, ids=str)
def test_configs_of_every_release_load_without_a_word(folder: Path):
    """Also those of 0.1 whose methods have no choice of sites, and whose files hold the fields that choose as null."""
    written = json.loads((RELEASED / folder / "adapter_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(RELEASED / folder)
    assert ("towers" in config.to_dict()) == isinstance(config, TargetedConfig)
    assert config.target_modules is written.get("target_modules") is None
    if not isinstance(config, TargetedConfig):
        with pytest.raises(ValueError, match=r"target_modules must be None: .*, got \['q_proj'\]"):
            type(config)(**{**config.to_dict(), "target_modules": ["q_proj"]})


@pytest.mark.parametrize("folder", ADAPTERS, ids=str)
def test_a_newer_format_is_refused(folder: Path, tmp_path: Path):
    shutil.copytree(RELEASED / folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(file.read_text())
    assert written["format_version"] <= FORMAT_VERSION
    assert written["package_version"].startswith(folder.parts[0])
    file.write_text(json.dumps({**written, "format_version": FORMAT_VERSION + 1, "package_version": "9.0", "new": 1}))
    for by in (load, PeftModel.from_pretrained):
        with pytest.raises(
            ValueError, match=rf"format {FORMAT_VERSION + 1}, written by peft_multimodal 9.0.*Upgrade: pip"
        ):
            by(home(folder.name).build(), tmp_path / "adapter")


def test_fields_of_a_newer_version_of_the_same_format_are_a_warning(tmp_path: Path):
    folder = tmp_path / "adapter"
    shutil.copytree(RELEASED / "0.1" / "aurora_mode_approx", folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**written, "new": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['new'\]"):
        load(home("aurora_mode_approx").build(), folder)


def test_the_changelog_knows_this_version():
    assert f"## {peft_multimodal.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.full
def test_wheel_and_sdist_install(tmp_path: Path):
    """Built from the sources, installed into an environment that has the dependencies alone, used from elsewhere."""
    source, built = tmp_path / "source", tmp_path / "built"
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in (n for n in files if (ROOT / n).is_file()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    make_sdist = f"from setuptools import build_meta; print(build_meta.build_sdist({str(built)!r}))"
    subprocess.run([sys.executable, "-c", make_sdist], cwd=source, check=True, capture_output=True)
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("peft_multimodal/py.typed") for name in archive.getnames())
        assert not any("/tests/" in name for name in archive.getnames())  # they need the repository
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(sdist)], check=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    sources = {str(f.relative_to(ROOT)) for f in (ROOT / "peft_multimodal").rglob("*.py")}
    assert {name for name in inside if ".dist-info/" not in name} == sources | {"peft_multimodal/py.typed"}

    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "clean")], check=True)
    python = tmp_path / "clean" / "bin" / "python"
    packages = next((tmp_path / "clean" / "lib").glob("python*/site-packages"))
    subprocess.run([str(python), *pip[1:], "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    FAMILIES["clip"].build().save_pretrained(tmp_path / "clip")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(python), "-m", "peft_multimodal", "doctor", str(tmp_path / "clip"), "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["peft-multimodal"] == peft_multimodal.__version__
    where = "import peft_multimodal; print(peft_multimodal.__file__)"
    done = subprocess.run(
        [str(python), "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().startswith(str(packages))
