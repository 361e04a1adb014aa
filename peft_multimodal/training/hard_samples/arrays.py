"""Arrays in a safetensors file, of which an interrupted save leaves the old one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file, written aside and renamed: an interrupted save leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside, metadata)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)
    return path


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a safetensors file; ValueError where it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}.")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}).") from None
