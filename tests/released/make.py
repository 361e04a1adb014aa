"""The adapters of a release, kept to be loaded by every later one: `PYTHONPATH=tests python tests/released/make.py` before it is tagged.

Each is a tiny adapter of a method in a folder of the release, with the output that it gave on its family's batch. What is
there already is never written again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from methods import METHODS, home, run, wrap
from safetensors.torch import save_file

from peft_multimodal import __version__, save


def make(folder: Path) -> None:
    """Write the adapters that the folder of this release lacks."""
    for method in METHODS:
        if (folder / method).exists() or method == "gated_xattn-encoder":  # its encoder lies elsewhere
            continue
        family = home(method)
        changes = {"save_encoder": True} if method == "cross_lingual_adapter" else {}
        model = wrap(family, method, **changes)
        if changes:
            model.peft_config["default"].encoder = "kept-in-the-folder"  # no path of the machine that it was made on
        save(model, folder / method)
        save_file({"output": run(family, model).contiguous()}, folder / method / "output.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make(Path(__file__).parent / ".".join(__version__.split(".")[:2]))
