"""Saving aside and renaming; loading with one clear message for whatever is wrong with the files.

PEFT's own `save_pretrained` and `from_pretrained` work with these adapters too. What this adds: a failed or interrupted
save leaves the old adapter as it was, and files are checked before the model is touched.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn


class AdapterError(ValueError):
    """The adapter's files can't be used; the message says why and what to do."""


def save(model: PeftModel, folder: str | os.PathLike, **kwargs: Any) -> Path:
    """`model.save_pretrained(folder)`, written aside and renamed: an interrupted save leaves the old files as they were.

    Where an adapter brings the rows of new tokens itself, PEFT's look at the embeddings (and on the Hub, for how large
    they were) is left out.

    Args:
        kwargs: Passed on to `PeftModel.save_pretrained`.
    """
    if getattr(model.base_model, "owns_token_rows", False):
        kwargs.setdefault("save_embedding_layers", False)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(str(aside), **kwargs)
        aside.chmod(0o755)
        if not folder.exists():
            os.replace(aside, folder)
            return folder
        # The folder may hold more than the adapter (a trainer's state): replace file by file, the config last.
        files = sorted((p for p in aside.rglob("*") if p.is_file()), key=lambda p: p.name == CONFIG_NAME)
        for file in files:
            target = folder / file.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        return folder
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load(model: nn.Module, name_or_path: str | os.PathLike, **kwargs: Any) -> PeftModel:
    """`PeftModel.from_pretrained(model, name_or_path)` after a check of the files.

    Args:
        model: The base model.
        name_or_path: A folder, or the id of a repository on the Hub.
        kwargs: Passed on to `PeftModel.from_pretrained` (adapter_name, is_trainable, revision, subfolder, ...).

    Raises:
        AdapterError: a file is missing, truncated, no JSON object, of an unknown kind, or no safetensors.
    """
    folder = Path(name_or_path, kwargs.get("subfolder") or "")
    if folder.is_dir():
        check_files(folder)
    return PeftModel.from_pretrained(model, str(name_or_path), **kwargs)


def check_files(folder: Path) -> None:
    """Raise AdapterError unless the folder holds a readable adapter."""
    config_file, weights_file = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    if not config_file.is_file():
        raise AdapterError(f"{folder} has no {CONFIG_NAME}: it is no adapter folder, or its save was interrupted.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterError(
            f"{config_file} is no JSON file ({error}). Restore it from where the adapter was saved."
        ) from None
    if not isinstance(config, dict):
        raise AdapterError(f"{config_file} must hold a JSON object, not a {type(config).__name__}.")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(
            f"{config_file} names the method {kind!r}, which neither PEFT nor this package knows. Import the package that "
            "defines it, or upgrade peft and peft-multimodal."
        )
    if not weights_file.is_file():
        raise AdapterError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}; other formats are not loaded.")
    try:
        with safe_open(weights_file, framework="pt") as tensors:
            list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{weights_file} is damaged or truncated ({error}). Save or download it again.") from None
