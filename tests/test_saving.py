"""`save` leaves the old adapter alone until the new one is whole; `load` says what is wrong with the files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from case import declared
from families import FAMILIES
from methods import METHODS, distance, home, run, stir, trace, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import peft_multimodal
from peft_multimodal import load, save
from peft_multimodal.files.saving import AdapterError

FAMILY = FAMILIES["blip_retrieval"]
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(method: str, tmp_path: Path):
    family = home(method)
    model = wrap(family, method)
    folder = save(model, tmp_path / "deep" / "adapter")
    assert folder == tmp_path / "deep" / "adapter"
    assert set(content(folder)) == FILES | declared()[method].promises.companions
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"], "nothing temporary is left"
    assert folder.stat().st_mode & 0o777 == 0o755
    model.save_pretrained(tmp_path / "stock" / "adapter")
    assert content(folder) == content(tmp_path / "stock" / "adapter")
    for path in (folder, str(folder)):
        assert distance(run(family, load(family.build(), path)), run(family, model)) <= 1e-6


@pytest.mark.parametrize("by", [save, PeftModel.save_pretrained])
def test_a_relative_base_is_local_from_everywhere(by: Callable, tmp_path: Path, monkeypatch):
    """Seen from another directory its path looks like a repository's id."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    FAMILY.build().save_pretrained("models/base")
    model = wrap(FAMILY, "aurora_mode_approx", base=type(FAMILY.build()).from_pretrained("models/base"))
    monkeypatch.chdir("elsewhere")
    by(model, "adapter")
    card = Path("adapter/README.md").read_text()
    assert "a local BlipForImageTextRetrieval" in card
    assert "models/base" not in card


def test_keywords_reach_peft(tmp_path: Path):
    model = wrap(FAMILY, "aurora_mode_approx")
    model.add_adapter("other", METHODS["aurora_mode_approx"](FAMILY))
    save(model, tmp_path, selected_adapters=["other"])
    assert set(content(tmp_path)) == {"README.md", *(f"other/{name}" for name in FILES - {"README.md"})}
    loaded = load(FAMILY.build(), tmp_path, subfolder="other", adapter_name="mine", is_trainable=True)
    assert loaded.active_adapters == ["mine"]
    assert any(p.requires_grad for p in loaded.parameters())


def test_saving_over_an_adapter_replaces_it_and_keeps_the_rest(tmp_path: Path):
    model = wrap(FAMILY, "aurora_mode_approx")
    save(model, tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    stir(model, seed=7)
    save(model, tmp_path)
    assert set(content(tmp_path)) == FILES | {"trainer_state.json"}
    assert distance(run(FAMILY, load(FAMILY.build(), tmp_path)), run(FAMILY, model)) <= 1e-6


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["weights", "config"])
def test_an_interrupted_save_leaves_the_old_files(error: BaseException, moment: str, tmp_path: Path, monkeypatch):
    model = wrap(FAMILY, "aurora_mode_approx")
    save(model, tmp_path / "adapter")
    before = content(tmp_path)
    stir(model, seed=7)

    def interrupted(*args, **kwargs):
        raise error

    if moment == "weights":
        monkeypatch.setattr("peft.peft_model.safe_save_file", interrupted)
    else:
        monkeypatch.setattr(type(model.peft_config["default"]), "save_pretrained", interrupted)
    for target in ("adapter", "new"):
        with pytest.raises(type(error)):
            save(model, tmp_path / target)
    assert content(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert load(FAMILY.build(), tmp_path / "adapter")


def test_the_config_is_replaced_last(tmp_path: Path, monkeypatch):
    """Where folders can't change places: an adapter without config is no adapter, so what is half replaced is none."""
    monkeypatch.setattr(peft_multimodal.files.saving, "_exchange", lambda *folders: False)
    model = wrap(FAMILY, "aurora_mode_approx")
    save(model, tmp_path)
    replaced = []
    real = peft_multimodal.files.saving.os.replace
    monkeypatch.setattr(
        peft_multimodal.files.saving.os, "replace", lambda a, b: (replaced.append(Path(b).name), real(a, b))[1]
    )
    save(model, tmp_path)
    assert set(replaced) == FILES
    assert replaced[-1] == "adapter_config.json"


WAYS = pytest.mark.parametrize("way", ["exchanged", "one by one"])


@pytest.fixture
def by_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(way: str) -> None:
        if way == "one by one":
            monkeypatch.setattr(peft_multimodal.files.saving, "_exchange", lambda *folders: False)

    return use


def inventory(folder: Path) -> dict[str, Any]:
    """What a folder holds but for the adapter's own files: kinds, modes, contents, where links lead."""
    found: dict[str, Any] = {}
    for path in [folder, *folder.rglob("*")]:
        if path.name not in FILES:
            inside = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(folder))] = (oct(path.lstat().st_mode), inside)
    return found


@WAYS
def test_what_else_is_in_the_folder_stays_as_it_is(way: str, by_files: Callable, tmp_path: Path):
    folder, model = tmp_path / "adapter", wrap(FAMILY, "aurora_mode_approx")
    model.add_adapter("other", METHODS["aurora_mode_approx"](FAMILY))
    save(model, folder)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "image").write_text("1")
    (folder / "empty").mkdir()
    (folder / "private").mkdir()
    (folder / "private" / "notes.txt").write_text("mine")
    (folder / "link").symlink_to(tmp_path / "data")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "private" / "notes.txt").chmod(0o600)
    (folder / "private").chmod(0o700)
    (folder / "other").chmod(0o750)
    folder.chmod(0o710)
    before = inventory(folder)
    stir(model, seed=7)
    by_files(way)
    save(model, folder)
    assert inventory(folder) == before
    assert (tmp_path / "data" / "image").read_text() == "1"
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "data"}
    assert distance(run(FAMILY, load(FAMILY.build(), folder)), run(FAMILY, model)) <= 1e-6


@WAYS
def test_a_file_is_no_folder(way: str, by_files: Callable, tmp_path: Path):
    by_files(way)
    model = wrap(FAMILY, "aurora_mode_approx")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match=r"file is a file\. Name a folder"):
        save(model, tmp_path / "file")
    assert content(tmp_path) == {"file": b"precious"}
    save(model, tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    (tmp_path / "adapter" / WEIGHTS).mkdir()
    before = content(tmp_path)
    with pytest.raises(IsADirectoryError, match=r"adapter_model\.safetensors is a folder"):
        save(model, tmp_path / "adapter")
    assert content(tmp_path) == before


@pytest.mark.parametrize("target", ["adapter", "nowhere"])
def test_through_a_link(target: str, tmp_path: Path):
    model = wrap(FAMILY, "aurora_mode_approx")
    save(model, tmp_path / "there" / "adapter")
    (tmp_path / "link").symlink_to(tmp_path / "there" / target)
    stir(model, seed=7)
    assert save(model, tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert distance(run(FAMILY, load(FAMILY.build(), tmp_path / "there" / target)), run(FAMILY, model)) <= 1e-6


@pytest.mark.parametrize("place", [".", "..", "../../adapter"])
def test_the_process_stands_in_the_folder(place: str, tmp_path: Path, monkeypatch):
    folder, model = tmp_path / "adapter", wrap(FAMILY, "aurora_mode_approx")
    save(model, folder)
    (folder / "below").mkdir()
    here = folder if place == "." else folder / "below"
    monkeypatch.chdir(here)
    stir(model, seed=7)
    save(model, place)
    assert Path.cwd() == here
    assert sorted(os.listdir(folder)) == sorted([*FILES, "below"])
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert "# AuroraModeApprox" in (folder / "README.md").read_text()
    assert distance(run(FAMILY, load(FAMILY.build(), folder)), run(FAMILY, model)) <= 1e-6


def test_onto_another_disk(tmp_path: Path, monkeypatch):
    """Nothing can be renamed from beside a mounted folder into it."""
    model, made = wrap(FAMILY, "aurora_mode_approx"), []
    real = peft_multimodal.files.saving.tempfile.mkdtemp
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    monkeypatch.setattr(
        peft_multimodal.files.saving.tempfile, "mkdtemp", lambda **k: (made.append(k["dir"]), real(**k))[1]
    )
    save(model, tmp_path)
    assert made == [tmp_path]
    assert set(content(tmp_path)) == FILES


def test_what_another_process_writes_meanwhile_stays(tmp_path: Path, monkeypatch):
    model = wrap(FAMILY, "aurora_mode_approx")
    save(model, tmp_path / "adapter")
    carry = peft_multimodal.files.saving._carry_over

    def and_then(source: Path, target: Path) -> None:
        carry(source, target)
        if source == tmp_path / "adapter":
            (source / "late").mkdir()
            (source / "late" / "log.txt").write_text("mine")

    monkeypatch.setattr(peft_multimodal.files.saving, "_carry_over", and_then)
    save(model, tmp_path / "adapter")
    assert set(content(tmp_path)) == {"adapter/late/log.txt", *(f"adapter/{name}" for name in FILES)}


def test_other_formats_are_not_written(tmp_path: Path):
    """They would lie beside the old weights, which are those that load."""
    model = wrap(FAMILY, "aurora_mode_approx")
    save(model, tmp_path)
    before = content(tmp_path)
    for publish in (save, peft_multimodal.push_to_hub):
        with pytest.raises(ValueError, match=r"safe_serialization=False: .* safetensors alone"):
            publish(model, str(tmp_path), safe_serialization=False)
    assert content(tmp_path) == before


# ------------------------------------------------------------------------------------------------------ damaged files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BROKEN = {
    "no config": (CONFIG, None, "has no adapter_config.json"),
    "empty config": (CONFIG, b"", "is no JSON file"),
    "half a config": (CONFIG, b'{"peft_type": "AURORA', "is no JSON file"),
    "binary config": (CONFIG, b"\xff\xfe\x00\x80", "is no JSON file"),
    "deep config": (CONFIG, b"[" * 100_000, "is no JSON file"),
    **{
        f"config is {text}": (CONFIG, text.encode(), "must hold a JSON object, not a")
        for text in ("[]", "null", '"text"', "3")
    },
    "no method": (CONFIG, b"{}", "has no peft_type"),
    "a method of another type": (CONFIG, b'{"peft_type": ["LORA"]}', r"names the method \['LORA'\]"),
    "unknown method": (CONFIG, b'{"peft_type": "NONSENSE"}', "names the method 'NONSENSE'.*upgrade"),
    "no weights": (WEIGHTS, None, "has no adapter_model.safetensors"),
    "empty weights": (WEIGHTS, b"", "damaged or truncated"),
    "weights are text": (WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n" * 9, "damaged or truncated"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_named_before_the_model_is_touched(what: str, tmp_path: Path):
    name, data, message = BROKEN[what]
    wrap(FAMILY, "aurora_mode_approx").save_pretrained(tmp_path)
    (tmp_path / name).unlink() if data is None else (tmp_path / name).write_bytes(data)
    model = FAMILY.build()
    before = trace(model)
    with pytest.raises(AdapterError, match=message) as error:
        load(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert trace(model) == before


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_truncated_weights(keep: float, tmp_path: Path):
    wrap(FAMILY, "aurora_mode_approx").save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(AdapterError, match=r"damaged or truncated.*Save or download it again"):
        load(FAMILY.build(), tmp_path)


def test_a_folder_that_does_not_exist(tmp_path: Path):
    with pytest.raises(ValueError, match="missing_adapter"):
        load(FAMILY.build(), tmp_path / "missing_adapter")


def test_a_stock_adapter_loads_too(tmp_path: Path):
    model = get_peft_model(FAMILY.build(), LoraConfig(r=2, target_modules=["query"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save(model, tmp_path)
    loaded = load(FAMILY.build(), tmp_path)
    assert isinstance(loaded, PeftModel)
    assert distance(run(FAMILY, loaded), run(FAMILY, model)) <= 1e-6


SIGNATURES = {
    "blip_retrieval": ("BlipForImageTextRetrieval", {"vision": [2, 48], "text": [2, 32], "fusion": [2, 32]}),
    "clip": ("CLIPModel", {"vision": [2, 48], "text": [2, 32]}),
    "llava": ("LlavaForConditionalGeneration", {"vision": [3, 48], "decoder": [2, 32]}),
    "llama": ("LlamaForCausalLM", {"decoder": [2, 32]}),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_the_config_says_about_the_adapter(method: str, tmp_path: Path):
    family = home(method)
    save(wrap(family, method), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["format_version"] == peft_multimodal.core.config.FORMAT_VERSION
    assert config["package_version"] == peft_multimodal.__version__
    model_class, towers = SIGNATURES[family.name]
    assert config["base_signature"]["model_class"] == model_class
    keys = load_file(tmp_path / "adapter_model.safetensors")
    adapted = {
        key.removeprefix("base_model.model.").partition(".")[0] for key in keys
    } & towers.keys()  # by their roles
    assert adapted
    assert config["base_signature"]["towers"] == {tower: towers[tower] for tower in adapted}
    assert config["inference_mode"] is True
