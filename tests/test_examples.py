"""Every guide's example and the notebook run on real weights, for a few steps, and what they save loads."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from peft import PeftConfig
from PIL import Image

from benchmarks.assets.fetch import cache_dir
from examples.shared import captioned, labelled
from peft_multimodal.doctor import examine

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem not in ("__init__", "shared"))
CLIP = ("english-clip-2", "emoji-pictures-1")
NEEDS = {
    "another_language": (*CLIP, "e5-small-1"),
    "a_model_that_sees": ("easy-vqa-1", "english-clip-2", "smollm2-135m-1", "dinov2-small-1"),
}
RESULTS = {  # what is printed of the result, and of the run
    "images_and_captions": r"Mean recall on 12 unseen images: [\d.]+ % before, [\d.]+ % after\.",
    "another_language": r"Mean recall by 12 unseen texts in 'de': [\d.]+ % by the English text tower, [\d.]+ % by the adapter\.",
    "narrow_domain": r"Mean recall in the domain: [\d.]+ % before, [\d.]+ % after\.\nGeneral mean recall: ([\d.]+) % before, [\d.]+ % after, \1 % with the adapter off\.",
    "few_labels": r"Right of 12 unseen images: [\d.]+ % zero-shot, [\d.]+ % from 8 labels\.",
    "a_model_that_sees": r"Loss of 12 unseen answers: [\d.]+ with their image, [\d.]+ with another one\.",
    "many_processes": r"Mean recall on 12 unseen images: [\d.]+ % before, [\d.]+ % after\.\n2 process\(es\) trained it\.",
}
OPTIONS = {"another_language": ["--language", "de"], "few_labels": ["--shots", "1"], "many_processes": ["--batch", "4"]}
ADAPTERS = {"another_language": "de"}  # in a folder of its name


def needs(*keys: str) -> None:
    for key in keys:
        if not (cache_dir() / key).is_dir():
            pytest.skip(f"{key} is not in the cache: `python -m benchmarks.assets` prepares it")


def options(name: str, output: Path) -> list[str]:
    return ["--steps", "2", "--limit", "12", "--output", str(output), *OPTIONS.get(name, ())]


def check(name: str, printed: str, output: Path) -> None:
    """The result is printed once, and the adapter is where the last line says."""
    assert len(re.findall(RESULTS[name], printed)) == 1, printed
    assert re.search(r"^2 steps, .* seconds, mean loss \d", printed, re.MULTILINE), "no summary of the training"
    folder = output / ADAPTERS.get(name, "")
    assert f"The adapter is in {folder}" in printed.splitlines()[-1]
    report = examine(PeftConfig.from_pretrained(folder).base_model_name_or_path, folder)
    assert report.healthy, report


@pytest.mark.assets
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "many_processes"])
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    needs(*NEEDS.get(name, CLIP))
    monkeypatch.chdir(tmp_path)
    importlib.import_module(f"examples.{name}").main(options(name, tmp_path / "adapter"))
    check(name, capsys.readouterr().out, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.assets
def test_two_processes_train_one_adapter(tmp_path: Path):
    needs(*CLIP)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "examples.many_processes", *options("many_processes", tmp_path / "adapter")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    check("many_processes", done.stdout, tmp_path / "adapter")


@pytest.mark.assets
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a kernel of its own, from the folder that it lies in; it is kept without outputs."""
    needs(*NEEDS["another_language"])
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "clear the outputs"
    settings = next(cell for cell in code if "parameters" in cell.metadata.get("tags", ()))
    quick = {"STEPS": 3, "LIMIT": 24, "OUTPUT": f"Path({str(tmp_path)!r})"}
    settings.source += "".join(f"\n{name} = {value}" for name, value in quick.items())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "examples")}})
    client.execute()
    outputs = [output for cell in code for output in cell.outputs]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) == 3, "the bars, the loss and the gallery"
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert float(re.findall(r"embeddings differ by (\S+)", said)[0]) < 1e-6
    assert (tmp_path / "zh/adapter_model.safetensors").is_file()


def image(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


@pytest.mark.parametrize("described", [True, False])
def test_captions_of_a_folder_of_yours(described: bool, tmp_path: Path):
    names = ["red", "green", "blue", "black", "white"]
    for number, name in enumerate(names):
        image(tmp_path / "images" / (f"{number}.png" if described else f"a_{name}_square.png"), name)
    if described:
        lines = [f"{number}.png,{number},a {name} square" for number, name in enumerate(names)]
        (tmp_path / "images/metadata.csv").write_text("file_name,id,text\n" + "\n".join(lines) + "\n")
    data = captioned(tmp_path / "images")
    assert [len(data[split]) for split in ("train", "test")] == [4, 1]
    rows = [row for split in data.values() for row in split]
    assert sorted(row["text"] for row in rows) == sorted(f"a {name} square" for name in names)
    assert len({row["id"] for row in rows}) == 5
    assert all(isinstance(row["id"], str) and row["image"].size == (8, 8) for row in rows)
    assert len(captioned(tmp_path / "images", limit=2)["train"]) == 2


def test_classes_of_a_folder_of_yours(tmp_path: Path):
    for name in ("red apple", "black cat"):
        for number in range(5):
            image(tmp_path / name / f"{number}.png", name.split()[0])
    data = labelled(tmp_path, shots=2)
    assert data["train"].features["label"].names == ["black cat", "red apple"]
    assert sorted(data["train"]["label"]) == [0, 0, 1, 1]
    assert len(data["test"]) == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_has_its_guide(name: str):
    page, table = (ROOT / path for path in (f"docs/guides/{name.replace('_', '-')}.md", "examples/README.md"))
    assert f"../../examples/{name}.py" in page.read_text("utf-8"), f"the guide {page.name} doesn't name its example"
    assert f"-m examples.{name}`" in table.read_text("utf-8")
    assert len((ROOT / f"examples/{name}.py").read_text("utf-8").splitlines()) <= 80, "too long for an example"
