"""The model card of a folder with adapters: written from the folder's own files, so it says what is there.

What stands outside the card's two marks is its reader's own and stays as it is, as do the metadata that are set already.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard
from peft import __version__ as peft_version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .._version import INSTALL, __version__
from ..core.companions import CardNotes, record_of, writes_cards
from ..core.config import MultimodalConfig
from ..core.registry import method_of
from ..core.storage import is_hub_id

CARD = "README.md"
BEGIN, END = "<!-- written by peft-multimodal: begin -->", "<!-- written by peft-multimodal: end -->"
_OTHERS_TEMPLATE = "[More Information Needed]"  # in the cards that PEFT and transformers write unasked
# What a card begins with that transformers' Trainer has written.
_TRAINERS = "<!-- This model card has been generated automatically"
_CLASSES_IN_SNIPPET = 12


@dataclass
class StoredAdapter:
    """What an adapter's files say of it.

    Args:
        subfolder: Of the folder that the card is for; None: the folder itself.
        config: The content of `adapter_config.json`.
        parameters, size: Numbers of the weights file, and its bytes.
    """

    subfolder: str | None
    config: dict[str, Any]
    parameters: int
    size: int

    @property
    def method(self) -> str:
        peft_type = self.config.get("peft_type")
        if (ours := method_of(peft_type)) is not None:
            return ours.title
        config_class = dict[Any, Any](PEFT_TYPE_TO_CONFIG_MAPPING).get(peft_type)
        return "unknown" if config_class is None else config_class.__name__.removesuffix("Config")

    @property
    def base_class(self) -> str:
        mapped = (self.config.get("auto_mapping") or {}).get("base_model_class")
        return mapped or (self.config.get("base_signature") or {}).get("model_class") or "AutoModel"


def stored_adapters(folder: Path) -> list[StoredAdapter]:
    """The adapters of a folder: its own and those of its subfolders, but for a trainer's checkpoints."""
    found = []
    for file in [folder / CONFIG_NAME, *sorted(folder.glob(f"*/{CONFIG_NAME}"))]:
        weights, name = file.parent / SAFETENSORS_WEIGHTS_NAME, file.parent.name
        if not (file.is_file() and weights.is_file()) or re.fullmatch(r"checkpoint-\d+", name):
            continue
        with safe_open(weights, framework="pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118  (no mapping)
        parameters = sum(map(math.prod, shapes))
        subfolder = None if file.parent == folder else name
        found.append(StoredAdapter(subfolder, json.loads(file.read_text()), parameters, weights.stat().st_size))
    return found


@writes_cards
def renew_card(model: Any, folder: Path, name: str, notes: CardNotes | None = None) -> None:
    """Write or renew the README.md of a folder with adapters; what its reader has written beside our block stays.

    Args:
        model: The `PeftModel` that they were saved from, which knows more of them than their files.
        name: What the snippet calls the place: the repository's id, or the folder.
        notes: What the user says of them.
    """
    configs: dict[str, Any] = {n: c for n, c in model.peft_config.items() if isinstance(c, MultimodalConfig)}
    adapters, notes = stored_adapters(folder), notes or CardNotes()
    if not configs or not adapters:
        return
    known = [m.model.card_notes(model, n) for n, c in configs.items() for m in [method_of(c)] if m is not None]
    languages = notes.languages or [language for note in known for language in note.languages]
    notes = replace(notes, languages=languages, classes=notes.classes or (known[0].classes if known else ()))
    base = adapters[0].config.get("base_model_name_or_path")
    # Seen from another folder the path of a local base may look like a Hub id.
    local = not is_hub_id(base) or base in {record_of(config).local_base for config in configs.values()}
    file = folder / CARD
    card = ModelCard(file.read_text(encoding="utf-8") if file.is_file() else "", ignore_metadata_errors=True)
    _set_metadata(card.data, adapters, None if local else base, notes)
    before, _, rest = card.text.partition(BEGIN)
    ours, _, after = rest.partition(END)
    # What was measured once stays when the adapter is saved again.
    metrics = _metrics(notes) or "".join(re.findall(r"## Metrics\n.*", ours, re.DOTALL)).strip()
    block = "\n\n".join(filter(None, (BEGIN, *_body(adapters, base, local, name, notes), metrics, END)))
    if ours:
        card.text = before + block + after
    elif card.text.lstrip().startswith(_TRAINERS):
        card.text = f"{block}\n\n{card.text.lstrip()}"
    elif not card.text.strip() or _OTHERS_TEMPLATE in card.text:
        versions = f"- PEFT {peft_version}\n- peft-multimodal {__version__}\n- Transformers {transformers.__version__}"
        card.text = f"{block}\n\n### Framework versions\n\n{versions}\n"
    card.save(file)


def _set_metadata(data: Any, adapters: list[StoredAdapter], base: str | None, notes: CardNotes) -> None:
    """The Hub refuses a card whose base is a local path, which is where PEFT's own card leads to."""
    data.library_name = "peft"
    data.base_model = base
    theirs = [tag for tag in data.tags or [] if not tag.startswith("base_model:")]
    kinds = [a.config.get("peft_type", "").lower().replace("_", "-") for a in adapters]
    ours = ["peft-multimodal", *kinds, *([f"base_model:adapter:{base}"] if base else [])]
    data.tags = sorted({*theirs, *ours})
    if notes.languages:
        data.language = list(notes.languages)
    if notes.license:
        data.license = notes.license
    if notes.metrics and notes.dataset:
        kind = "other" if not is_hub_id(notes.dataset) else notes.dataset
        data.model_name = data.model_name or adapters[0].method
        data.eval_results = [
            EvalResult("other", kind, notes.dataset, re.sub(r"\W+", "_", name).lower(), value, metric_name=name)
            for name, value in notes.metrics.items()
        ]


def _body(adapters: list[StoredAdapter], base: str | None, local: bool, name: str, notes: CardNotes) -> list[str]:
    first = adapters[0]
    what = f"a local {first.base_class}" if local else f"`{base}`"
    title = f"{len(adapters)} adapters" if len(adapters) > 1 else first.method
    facts = [("base model", what if local else f"{what} ({first.base_class})")]
    for adapter in adapters:
        of = f"`{adapter.subfolder}`: " if len(adapters) > 1 else ""
        facts.append(("method", of + adapter.method))
        towers = ((adapter.config.get("base_signature") or {}).get("towers") or {}).items()
        sizes = ", ".join(f"{tower} ({n} attentions of width {width})" for tower, (n, width) in towers)
        facts.append(("towers", of + sizes))
        facts.append(("parameters", f"{of}{adapter.parameters:,} ({adapter.size:,} bytes)"))
        encoders = [adapter.config.get(key) for key in ("encoder", "vision_encoder")]
        facts += [("frozen encoder", f"{of}`{e}`" if is_hub_id(e) else f"{of}a local model") for e in encoders if e]
    if notes.languages:
        facts.append(("languages", ", ".join(notes.languages)))
    if notes.classes:
        facts.append((f"{len(notes.classes)} classes", ", ".join(map(_cell, notes.classes))))
    return [
        f"# {title} for {what}",
        "An adapter for a vision-language model, of the package `peft-multimodal`, in PEFT's format.",
        _table(("", ""), facts),
        f"## Use\n\nInstall `peft-multimodal` by `{INSTALL}` in the folder of its sources.\n\n```python\n{_snippet(adapters, base, local, name, notes)}\n```",
    ]


def _metrics(notes: CardNotes) -> str:
    if not notes.metrics:
        return ""
    rows = [(_cell(m), f"{v:.4g}" if isinstance(v, float) else _cell(str(v))) for m, v in notes.metrics.items()]
    on = f"On {_cell(notes.dataset)}:\n\n" if notes.dataset else ""
    return f"## Metrics\n\n{on}{_table(('metric', 'value'), rows)}"


def _snippet(adapters: list[StoredAdapter], base: str | None, local: bool, name: str, notes: CardNotes) -> str:
    """Code that loads the adapters. What is printed into it is quoted: no name ends its string."""
    first = adapters[0]
    base_class = first.base_class if first.base_class.isidentifier() else "AutoModel"
    given = _quoted(Path(base).name if base and local else base or "path/to/the/base/model")
    method = method_of(first.config.get("peft_type"))
    has_classes = method is not None and method.promises.classes
    imports = [base_class, *(["AutoTokenizer"] if has_classes else [])]
    place = [_place(adapter) for adapter in adapters]
    lines = [
        "import peft_multimodal",
        f"from transformers import {', '.join(sorted(imports))}",
        "",
        f"base = {base_class}.from_pretrained({given})" + ("  # the local folder of the base model" if local else ""),
        f"model = peft_multimodal.load(base, {_quoted(name)}{place[0]})",
        *(f"model.load_adapter({_quoted(name)}{where})" for where in place[1:]),
    ]
    if has_classes:
        limit = None if first.config.get("domain") == "per_class" else _CLASSES_IN_SNIPPET
        classes = list(notes.classes)[:limit] or ["red apple", "green apple"]
        lines += [f"classes = {_quoted(classes)}" + ("  # and so on" if len(notes.classes) > len(classes) else "")]
        lines += [f"model.set_classes(classes, AutoTokenizer.from_pretrained({given}))"]
    return "\n".join(lines)


def _place(adapter: StoredAdapter) -> str:
    if adapter.subfolder is None:
        return ""
    return f", subfolder={_quoted(adapter.subfolder)}, adapter_name={_quoted(adapter.subfolder)}"


def _quoted(value: str | list[str]) -> str:
    return json.dumps(value, ensure_ascii=False)  # a literal of Python too


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {a} | {b} |" for a, b in [head, ("---", "---"), *rows])


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
