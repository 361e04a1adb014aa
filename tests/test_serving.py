"""What a server would load of a LoRA: prepared folders, right ones and wrong ones, each found.

The rules are those of the servers' own sources, named in `files/servers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import METHODS, home, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_multimodal import __main__ as command
from peft_multimodal import export_lora
from peft_multimodal.core.registry import METHODS as REGISTRY
from peft_multimodal.files.servers import SERVERS
from peft_multimodal.serving import check_serving

LLAVA = FAMILIES["llava"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DECODER = rf".*language_model.*\.({'|'.join(ATTENTION)})"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    LLAVA.build().save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # the config is enough
    return folder


def lora(folder: Path, **fields: Any) -> Path:
    """A LoRA as PEFT's users save it, with the released checkpoint's names and last names as targets."""
    config = {"r": 8, "lora_alpha": 16, "target_modules": DECODER, "init_lora_weights": False, **fields}
    get_peft_model(LLAVA.build(), LoraConfig(**config)).save_pretrained(folder)
    rewrite(folder, lambda key: key.replace("model.model.language_model", "model.language_model.model"))
    if isinstance(config["target_modules"], str):
        configure(folder, target_modules=ATTENTION)
    return folder


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def rewrite(
    folder: Path, name: Callable[[str], str], value: Callable[[str, Tensor], Tensor | None] = lambda k, v: v
) -> None:
    """Give every tensor of a folder another name and value; None drops it."""
    file = folder / "adapter_model.safetensors"
    changed = {name(key): value(key, tensor) for key, tensor in load_file(file).items()}
    save_file({k: v.contiguous() for k, v in changed.items() if v is not None}, file)


def export(folder: Path, server: str) -> None:
    export_lora(wrap(LLAVA, "aurora_mode_approx"), folder, target=server, drop=["vision"])


def add(folder: Path, key: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), key: torch.ones(2, 2)}, file)


# {name: (server, makes the folder, {verdict: how many modules}, what the start says)}
RIGHT: dict[str, tuple[str, Callable[[Path], Any], dict[str, int], str]] = {
    "exported for vLLM": ("vllm", lambda f: export(f, "vllm"), {"loaded": 6}, "--max-lora-rank 8"),
    "exported for SGLang": ("sglang", lambda f: export(f, "sglang"), {"loaded": 6}, "--max-lora-rank 4"),
    "exported for llama.cpp": ("llama.cpp", lambda f: export(f, "llama.cpp"), {"loaded": 6}, "convert_lora_to_gguf.py"),
    "PEFT's own": ("vllm", lora, {"loaded": 8}, "--max-lora-rank 8"),
    "a rank between vLLM's": ("vllm", lambda f: lora(f, r=48), {"loaded": 8}, "--max-lora-rank 64"),
    "patterns, which vLLM reads": ("vllm", lambda f: lora(f, rank_pattern={"k_proj": 2}), {"loaded": 8}, "--max-lora-rank 8"),
    "rsLoRA, which vLLM reads": ("vllm", lambda f: lora(f, use_rslora=True), {"loaded": 8}, ""),
    "image tower, on a condition": (
        "vllm", lambda f: lora(f, target_modules=["q_proj", "v_proj"]), {"loaded": 4, "conditional": 6}, "",
    ),
    "names of transformers 5": (
        "sglang",
        lambda f: rewrite(lora(f), lambda k: k.replace("language_model.model", "model.language_model")),
        {"loaded": 8},
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_folders_that_will_be_served(name: str, base: Path, tmp_path: Path):
    server, make, verdicts, start = RIGHT[name]
    make(tmp_path)
    report = check_serving(base, tmp_path, server)
    assert report.healthy, str(report)
    assert {v: sum(m.verdict == v for m in report.modules) for v in {m.verdict for m in report.modules}} == verdicts
    assert start in report.start
    assert "it will be served" in str(report)


def drop_b(key: str, value: Tensor) -> Tensor | None:
    return None if key.endswith("layers.0.self_attn.q_proj.lora_B.weight") else value


# {name: (server, makes the folder, what the problem says)}
WRONG: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "an adapter of this package": ("vllm", lambda f: wrap(LLAVA, "aurora_mode_approx").save_pretrained(f), "export_lora"),
    "keys that match nothing": (
        "vllm",
        lambda f: rewrite(lora(f), lambda k: k.replace("language_model.model", "language_model.decoder")),
        "8 of 8 modules ignored",
    ),
    "a last name that the base lacks": (
        "vllm", lambda f: rewrite(lora(f), lambda k: k.replace("o_proj", "out")), "2 of 8 modules refused",
    ),
    "keys that llama.cpp can't map": (
        "llama.cpp", lambda f: rewrite(lora(f), lambda k: k.replace("layers.1", "layers.7")), "4 of 8 modules refused",
    ),
    "whole modules": ("vllm", lambda f: lora(f, modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
    "whole modules, ignored": ("sglang", lambda f: lora(f, modules_to_save=["lm_head"]), "ignores them without a word"),
    "DoRA": ("vllm", lambda f: lora(f, use_dora=True), "use_dora=True"),
    "trained biases": ("llama.cpp", lambda f: configure(lora(f), bias="lora_only"), "bias='lora_only'"),
    "a rank that is too large": ("vllm", lambda f: lora(f, r=600), "at most 512"),
    "PiSSA": ("vllm", lambda f: configure(lora(f), init_lora_weights="pissa"), "makes PEFT change the base's weights"),
    "another base": ("vllm", lambda f: rewrite(lora(f), str, lambda k, v: v[:, :24] if "lora_A" in k else v), "another base"),
    "half of a pair": ("vllm", lambda f: rewrite(lora(f), str, drop_b), "lora_B is missing"),
    "a tensor of another kind": (
        "vllm", lambda f: add(lora(f), "base_model.model.language_model.model.norm.weight"), "aren't called MODULE.lora_A.weight",
    ),
    "image tower": ("sglang", lambda f: lora(f, target_modules=["q_proj", "v_proj"]), "6 of 10 modules refused"),
    "image tower, lost": ("llama.cpp", lambda f: lora(f, target_modules=["q_proj", "v_proj"]), "6 of 10 modules ignored"),
    "several ranks": ("sglang", lambda f: lora(f, rank_pattern={"k_proj": 2}), "reads no rank_pattern"),
    "several scales": ("sglang", lambda f: lora(f, alpha_pattern={"k_proj": 2}), "scales 2 of 8 modules"),
    "rsLoRA, which is not read": ("llama.cpp", lambda f: lora(f, use_rslora=True), "doesn't read use_rslora"),
    "targets by a pattern": ("sglang", lambda f: configure(lora(f), target_modules=DECODER), "a list of names alone"),
    "q without v": ("sglang", lambda f: lora(f, target_modules=r".*language_model.*\.q_proj"), "q_proj without v_proj"),
    "another method of PEFT": ("vllm", lambda f: configure(lora(f), peft_type="LOHA"), "reads LoRA alone"),
    "no weights": ("vllm", lambda f: (lora(f) / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "nothing in it": ("vllm", lambda f: rewrite(lora(f), str, lambda k, v: None), "nothing would be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_folders_that_will_not_be_served(name: str, base: Path, tmp_path: Path):
    server, make, says = WRONG[name]
    make(tmp_path)
    report = check_serving(base, tmp_path, server)
    assert not report.healthy
    problems = [finding for finding in report.findings if finding.level == "problem"]
    assert any(says in f"{p.what} {p.way_out}" for p in problems), str(report)
    assert all(problem.way_out for problem in problems)
    assert "it won't be served as it was trained" in str(report)


HOSTILE: list[tuple[str, Any]] = [
    *(("r", value) for value in ("8", [8], 0, -1, 10**400, 10**12, 1.5, None, True, float("inf"), float("nan"))),
    *(("lora_alpha", value) for value in ("x", None, 10**400, float("nan"))),
    *(("rank_pattern", value) for value in (["a"], {"(": 2}, {"q_proj": "x"}, {"q_proj": 0})),
    *(("modules_to_save", value) for value in (5, "lm_head", [{"a": 1}], [1, "a"])),
    *[("alpha_pattern", "x"), ("use_rslora", "no"), ("target_modules", 5)],
]


@pytest.mark.parametrize("server", SERVERS)
def test_values_that_make_no_sense(server: str, base: Path, tmp_path: Path):
    lora(tmp_path)
    whole = (tmp_path / "adapter_config.json").read_text()
    for name, value in HOSTILE:
        configure(tmp_path, **{name: value})
        report = check_serving(base, tmp_path, server)
        (problem,) = report.findings
        assert problem.what.startswith(f"{name} in adapter_config.json must be ")
        assert len(str(report)) < 1000
        (tmp_path / "adapter_config.json").write_text(whole)
    for name in ("r", "lora_alpha"):
        without = {key: value for key, value in json.loads(whole).items() if key != name}
        (tmp_path / "adapter_config.json").write_text(json.dumps(without))
        (problem,) = check_serving(base, tmp_path, server).findings
        assert problem.what == f"adapter_config.json has no {name}."


def of_rank_0(key: str, value: Tensor) -> Tensor:
    return value[:0] if "lora_A" in key else value[:, :0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: rewrite(f, str, lambda k, v: v[0, 0] if "layers.0" in k else v), "don't belong together"),
        (lambda f: rewrite(f, str, of_rank_0), "don't belong together"),
        (lambda f: configure(f, r=4), "has rank 8 in the file, 4 by the config"),
        (lambda f: rewrite(f, lambda k: k.replace("layers.1", "layers.\x1b[2J")), r"layers.\x1b[2J"),
        (lambda f: configure(f, bias="\x1b[2J" + "x" * 1000), r"bias='\x1b[2Jxx"),
        (lambda f: rewrite(f, lambda k: k.replace(".weight", ".default.weight")), "aren't called MODULE.lora_A.weight"),
    ],
)
def test_files_that_make_no_sense(change: Callable[[Path], Any], says: str, base: Path, tmp_path: Path):
    change(lora(tmp_path))
    report = check_serving(base, tmp_path, "vllm")
    assert not report.healthy
    assert says in str(report)
    assert "\x1b" not in str(report)
    assert "x" * 100 not in str(report)


def test_a_connector_is_no_language_model(base: Path, tmp_path: Path):
    lora(tmp_path, target_modules=r".*(linear_1|lm_head)")
    configure(tmp_path, target_modules=["linear_1", "lm_head"])
    for server, verdict in (("vllm", "conditional"), ("sglang", "refused"), ("llama.cpp", "ignored")):
        found = {m.name.rpartition(".")[2]: m.verdict for m in check_serving(base, tmp_path, server).modules}
        assert found == {"linear_1": verdict, "lm_head": "loaded"}


def test_nothing_is_called_loaded_that_was_not_looked_at(tmp_path: Path):
    report = check_serving(tmp_path / "no-base", lora(tmp_path / "lora"), "vllm")
    assert {module.verdict for module in report.modules} == {"unchecked"}
    (problem,) = report.findings
    assert "no model that transformers can read" in problem.what


def test_weights_that_are_no_file(base: Path, tmp_path: Path):
    file = lora(tmp_path) / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to("/dev/zero")
    (problem,) = check_serving(base, tmp_path, "vllm").findings
    assert problem.way_out == "Save or download the adapter again."


def test_a_config_that_may_not_be_read(base: Path, tmp_path: Path, monkeypatch):
    lora(tmp_path)

    def forbidden(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", forbidden)
        (problem,) = check_serving(base, tmp_path, "vllm").findings
    assert "Permission denied" in problem.what


@pytest.mark.parametrize("server", SERVERS)
def test_a_base_without_a_language_model(server: str, tmp_path: Path):
    clip = FAMILIES["clip"]
    export_lora(wrap(clip, "aurora_mode_approx"), tmp_path)
    report = check_serving(clip.build(), tmp_path, server)
    (problem,) = [f for f in report.findings if f.level == "problem"]
    assert "no language model" in problem.what
    assert "merge_and_unload" in problem.way_out


@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_of_ours_gets_a_way_out(method: str, base: Path, tmp_path: Path):
    wrap(home(method), method).save_pretrained(tmp_path)
    (problem,) = check_serving(base, tmp_path, "vllm").findings
    known = REGISTRY[method.partition("-")[0]]
    assert ("export_lora" in problem.way_out) is known.promises.lora
    assert ("merge_and_unload" in problem.way_out) is (known.model.not_mergeable is None)


def wrapped(model: PeftModel) -> list[Any]:
    """The layers that stand in a module's place."""
    return [layer for layer in model.base_model.own_layers() if hasattr(layer, "base_layer")]


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if "decoder" in f.towers and n != "llama"])
def test_what_is_exported_for_a_server_is_served(name: str, tmp_path: Path):
    """The keys that are written are those that are looked for, in every family that has a language model."""
    family = FAMILIES[name]
    model = wrap(family, "aurora_mode_approx", towers=["decoder"])
    for server in SERVERS:
        export_lora(model, tmp_path / server, target=server)
        report = check_serving(family.build(), tmp_path / server, server)
        assert report.healthy, str(report)
        assert {module.verdict for module in report.modules} == {"loaded"}
        assert len(report.modules) == sum(layer.has_adapter("default") for layer in wrapped(model))


def test_the_command(base: Path, tmp_path: Path, capsys):
    lora(tmp_path / "right")
    lora(tmp_path / "wrong", use_dora=True)
    assert command.main(["doctor", str(base), str(tmp_path / "right"), "--serve", "vllm"]) == 0
    text = capsys.readouterr().out
    for line in ("vLLM 0.33.0", "LlavaForConditionalGeneration", "modules: 8 loaded", "--max-lora-rank 8"):
        assert line in text
    assert command.main(["doctor", str(base), str(tmp_path / "wrong"), "--serve", "vllm", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is False
    assert report["server"] == "vllm"
    names = {module["name"]: module["verdict"] for module in report["modules"]}
    assert names["language_model.model.layers.0.self_attn.q_proj"] == "loaded"
    assert any("DoRA" in finding["what"] for finding in report["findings"])
    assert command.main(["doctor", "no/such-base", str(tmp_path / "right"), "--serve", "vllm"]) == 1
    for wrong in (["--serve", "tgi"], ["--serve"]):
        with pytest.raises(SystemExit):
            command.main(["doctor", str(base), str(tmp_path / "right"), *wrong])
    with pytest.raises(SystemExit):
        command.main(["doctor", str(base), "--serve", "vllm"])
    with pytest.raises(ValueError, match=r"'vllm', 'sglang', 'llama\.cpp'"):
        check_serving(base, tmp_path / "right", "tgi")
