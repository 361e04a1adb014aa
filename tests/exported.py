"""Loads exported LoRAs as anybody would who has PEFT alone, and compares what they compute.

python tests/exported.py FOLDER     # prints {family: {what: largest difference}}, and whether this package was imported
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel


def tensors(output: Any) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a model's output."""
    return {name: x for name, x in output.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}


@torch.no_grad()
def differences(folder: Path) -> dict[str, float]:
    kept = torch.load(folder / "kept.pt", weights_only=False)
    base = getattr(transformers, kept["class"])(kept["config"]).eval()
    base.load_state_dict(kept["weights"])
    start = tensors(base(**kept["batch"]))
    model = PeftModel.from_pretrained(base, folder / "lora")
    adapted = tensors(model(**kept["batch"]))
    merged = tensors(model.merge_and_unload()(**kept["batch"]))
    return {
        "adapted": far(adapted, kept["outputs"]),
        "merged": far(merged, kept["outputs"]),
        "base": far(start, kept["outputs"]),
    }


def far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest number of a tensor where that is above 1."""
    assert ours.keys() == theirs.keys() != set()
    return max(float((ours[n] - x).abs().max() / x.abs().max().clamp_min(1)) for n, x in theirs.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {folder.name: differences(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}
    print(json.dumps({"families": found, "imported": "peft_multimodal" in sys.modules}))
