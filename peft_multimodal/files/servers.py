"""What servers take of a LoRA, as read in their own sources. Facts alone: `export_lora` and the doctor act on them.

A server that is not named here, or of another version, may differ: `source` says what was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LANGUAGE_MODEL = "decoder"  # the tower whose LoRA every server takes


@dataclass(frozen=True)
class Server:
    """One server's rules for a folder with a LoRA.

    Args:
        name: As `--serve` and `export_lora(target=...)` call it.
        title: As people call it.
        source: The version and the files that were read.
        ranks: The ranks that it can reserve room for, ascending; () where any will do.
        scale: What it multiplies B A with. "peft": as PEFT does, by patterns and `use_rslora`. "config": `lora_alpha` / `r` for
            all modules, which therefore have one rank. "file": `lora_alpha` / the rank of the tensors.
        whole: Names of `modules_to_save` that it takes.
        others: What becomes of tensors that are no lora_A or lora_B: the adapter is "refused", or they are "ignored".
        refuses: {config field: why}, where the field is set to what stock LoRA has not.
        ignores: {config field: what happens}, the same, but nothing is said.
        by_path: Whether a key must name a module of the base; else the number of its layer and its last name count.
        unknown: What becomes of a key that names no module of the base, though there are such last names.
        other_towers: What becomes of LoRA outside the language model: taken on a condition, "refused" (it would do harm) or
            "ignored".
        towers_note: That condition, or what would happen.
        start: How the server is started with such a folder; {rank} stands for the rank.
    """

    name: str
    title: str
    source: str
    ranks: tuple[int, ...] = ()
    scale: Literal["peft", "config", "file"] = "peft"
    whole: frozenset[str] = frozenset()
    others: Literal["refused", "ignored"] = "refused"
    refuses: Mapping[str, str] = field(default_factory=dict)
    ignores: Mapping[str, str] = field(default_factory=dict)
    by_path: bool = True
    unknown: Literal["refused", "ignored"] = "refused"
    other_towers: Literal["conditional", "refused", "ignored"] = "refused"
    towers_note: str = ""
    start: str = ""

    def rank_for(self, rank: int) -> int | None:
        """The least rank that it reserves room for and that holds this one; None where it has none so large."""
        return next((r for r in self.ranks if r >= rank), None) if self.ranks else rank


SERVERS: dict[str, Server] = {
    server.name: server
    for server in (
        Server(
            "vllm",
            "vLLM",
            "vLLM 0.33.0: vllm/config/lora.py, vllm/lora/peft_helper.py, lora_model.py, model_manager.py",
            ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
            whole=frozenset({"classifier", "score"}),
            unknown="ignored",
            refuses={
                "use_dora": "DoRA isn't supported",
                "lora_bias": "a bias of the LoRA isn't supported",
                "bias": "trained biases aren't supported",
                "alora_invocation_tokens": "activated LoRA isn't supported",
                "layer_replication": "replicated layers aren't supported",
                "use_bdlora": "block-diagonal LoRA isn't supported",
                "use_qalora": "QALoRA isn't supported",
            },
            other_towers="conditional",
            towers_note="vLLM takes it from 0.14 on, only when started with --enable-tower-connector-lora, and only for model "
            "classes that declare supports_tower_connector_lora; else it ignores it without a word",
            start="--enable-lora --max-lora-rank {rank}",
        ),
        Server(
            "sglang",
            "SGLang",
            "SGLang 0.5.23: sglang/srt/lora/lora_config.py, lora.py, lora_manager.py, mem_pool.py, utils.py",
            scale="config",
            others="ignored",
            refuses={"use_dora": "DoRA isn't supported"},
            ignores={
                "lora_bias": "biases of the LoRA are left out",
                "bias": "trained biases are left out",
                "alora_invocation_tokens": "the LoRA acts on every token",
                "layer_replication": "layers aren't replicated",
            },
            by_path=False,
            other_towers="refused",
            towers_note="SGLang files weights under the number of the layer and the module's last name, so those of an image "
            "tower overwrite those of the language model",
            start="--enable-lora --max-lora-rank {rank} --lora-paths NAME=FOLDER",
        ),
        Server(
            "llama.cpp",
            "llama.cpp",
            "llama.cpp 0b03ada: convert_lora_to_gguf.py",
            scale="file",
            refuses={
                "use_dora": "its magnitudes are no lora_A or lora_B, and the conversion stops",
                "lora_bias": "biases are no lora_A or lora_B, and the conversion stops",
                "bias": "biases are no lora_A or lora_B, and the conversion stops",
            },
            ignores={"layer_replication": "layers aren't replicated"},
            other_towers="ignored",
            towers_note="the conversion is the language model's, and an image tower's LoRA gets lost in it",
            start="convert_lora_to_gguf.py FOLDER, then --lora FILE",
        ),
    )
}
"""Every server by its name."""

# Inits that make PEFT change the base's weights when the adapter is loaded, which no server does.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def odd_fields(config: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, str]:
    """Those of `fields` in which an adapter's config differs from a stock LoRA's."""
    stock: tuple[Any, ...] = (None, False, "none", [], {})
    return {name: why for name, why in fields.items() if config.get(name) not in stock}


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether PEFT would change the base's weights as it loads the adapter (`init_lora_weights="pissa"` and its like)."""
    return str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE)
