"""Adapters that are LoRA in other words, written as LoRA: what servers and PEFT without this package read.

Nothing is approximated: a method's layers give the factors of their update themselves (`MultimodalLayer.lora_factors`). Nothing
is dropped in silence: what a LoRA, or a server, has no place for is refused in one message, unless `drop` names it.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._version import __version__
from ..core.anatomy import base_model, unwrapped
from ..core.config import MultimodalConfig
from ..core.registry import method_of
from ..core.storage import is_hub_id
from ..core.towers import CONNECTOR
from .card import BEGIN, CARD, END
from .factors import WHOLE, Contents, Factors, contents_of, plain_path
from .released import released_names
from .saving import AdapterError, written_aside
from .servers import LANGUAGE_MODEL, SERVERS, Server, changes_base

PREFIX = "base_model.model."
TARGETS = ("peft", *SERVERS)


@torch.no_grad()
def export_lora(
    model: PeftModel,
    folder: str | os.PathLike,
    target: str = "peft",
    adapter_name: str | Sequence[str] | None = None,
    drop: Collection[str] = (),
) -> Path:
    """Write adapters as one LoRA in PEFT's format, with exactly their update and without approximation.

    The result needs no `peft_multimodal` any more: `PeftModel.from_pretrained` loads it, it merges, servers read it. Several
    adapters become one, their ranks side by side, which is their sum. The files keep the dtype of the adapter.

    Args:
        model: With the adapter, merged or not; of PEFT's own methods, LoRA may act beside ours.
        folder: Written aside and renamed, as `save` does it.
        target: "peft" for PEFT's `from_pretrained`, under the module paths of this release of transformers. A server's name
            ("vllm", "sglang", "llama.cpp") takes the released checkpoint's names, one rank for all modules, filled up with
            zeros to one that the server can reserve, and only what this server takes.
        adapter_name: One or several; None takes all that act, those of PEFT's own methods below ours too.
        drop: What may be left out, by its name in the message that refuses it: "modules_to_save", a tower ("vision"), or a part
            that is no update of a weight ("gqt").

    Raises:
        ValueError: the method is no LoRA; the adapter has what the target doesn't take and `drop` doesn't name; or its numbers
            are not finite.
        AdapterError: the folder holds an adapter that is no LoRA and would be lost.

    Examples:
        >>> export_lora(model, "served")  # for a server: target="vllm", drop=["vision"]
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(map(repr, TARGETS))}, got {target!r}.")
    folder, drop = Path(folder), {drop} if isinstance(drop, str) else set(drop)
    _check_folder(folder)
    configs = _configs(model, adapter_name)
    for name, of in configs.items():
        _check_is_lora(name, of)
    base, server = _base(model), SERVERS.get(target)
    contents = contents_of(base, list(configs))
    _check_complete(contents, server, drop)
    kept = {path: f for path, f in contents.modules.items() if f.tower not in drop}
    _check_finite(kept)
    config, tensors = _peft_files(base, kept) if server is None else _server_files(base, kept, server)
    if WHOLE not in drop and contents.whole:
        tensors |= {PREFIX + key: value.detach().clone().cpu().contiguous() for key, value in contents.whole.items()}
        config.modules_to_save = sorted({name for of in configs.values() for name in of.modules_to_save or ()})
    _describe_base(config, base, list(configs.values()))
    with written_aside(folder) as aside:
        save_file(tensors, str(aside / SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        config.save_pretrained(str(aside))
        _write_card(aside, config, target, list(configs.values()), sorted(drop))
    return folder


# --- what is there ---------------------------------------------------------------------------------------------------


def _configs(model: Any, adapter_name: str | Sequence[str] | None) -> dict[str, Any]:
    """{adapter: its config} of those that are meant."""
    model = unwrapped(model)
    known = getattr(model, "peft_config", None)
    if not isinstance(model, PeftModel) or not known:
        raise TypeError(f"export_lora takes a PeftModel with an adapter, got {type(model).__name__}.")
    names = _acting(model) if adapter_name is None else adapter_name
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"No such adapter: {unknown}. There are {list(known)}.")
    if not names:
        raise ValueError(f"No adapter is active. Name one: adapter_name={next(iter(known))!r}.")
    return {name: known[name] for name in names}


def _base(model: Any) -> nn.Module:
    """The base, also where PEFT was put on a PeftModel."""
    base = base_model(model)
    while isinstance(base, PeftModel):
        base = base_model(base)
    return base


def _acting(model: Any) -> list[str]:
    """The active adapters; where PEFT was put on a model twice, the outer PeftModel names its own alone."""
    layers = (m for m in _base(model).modules() if isinstance(m, BaseTunerLayer))
    acting = dict.fromkeys(name for layer in layers for name in layer.active_adapters if name in model.peft_config)
    return list(dict.fromkeys([*model.active_adapters, *acting]))


def _check_folder(folder: Path) -> None:
    """The trained adapter can't be made out of the LoRA again."""
    file = folder / CONFIG_NAME
    try:
        there = json.loads(file.read_text(encoding="utf-8")).get("peft_type") if file.is_file() else None
    except (ValueError, AttributeError):
        return
    if isinstance(there, str) and there != PeftType.LORA.value:
        raise AdapterError(
            f"{folder} holds an adapter of {there}, which the LoRA would replace.", "Name another folder for the LoRA."
        )


# Of a LoRA of PEFT's what is more than its factors.
_ODD = (
    *("use_dora", "lora_bias", "bias", "trainable_token_indices", "target_parameters", "layer_replication"),
    "alora_invocation_tokens",
)


def _inits(config: Any) -> list[str]:
    """The init, where it has changed the base's weights, which the exported LoRA would miss."""
    return [f"init_lora_weights={config.init_lora_weights!r}"] if changes_base(vars(config)) else []


def _check_is_lora(name: str, config: Any) -> None:
    method = method_of(config)
    if method is not None:
        if not method.promises.lora:
            raise ValueError(
                f"Adapter {name!r} ({method.title}) is no LoRA, and servers read nothing else. {method.model.not_mergeable} To "
                "serve it, run transformers with the adapter loaded: peft_multimodal.load(model, folder)."
            )
    elif isinstance(config, MultimodalConfig):
        raise ValueError(
            f"Adapter {name!r} is a {type(config).__name__}, which may train towers whole, and export_lora writes one LoRA. Merge "
            "it: model.merge_and_unload().save_pretrained(folder). Or train the tower that is served by a config of its own, "
            "without a policy."
        )
    elif config.peft_type != PeftType.LORA:
        raise ValueError(
            f"Adapter {name!r} is of {config.peft_type.value}, which is PEFT's own: peft.convert_to_lora approximates some of "
            "these by LoRA, merge_and_unload() merges most."
        )
    elif odd := [n for n in _ODD if getattr(config, n, None) not in (None, False, "none", [], {})] + _inits(config):
        raise ValueError(
            f"Adapter {name!r} is a LoRA with {', '.join(odd)}, which isn't written here. Save it by save_pretrained, or merge it."
        )


# --- what the target takes -------------------------------------------------------------------------------------------


def _check_complete(contents: Contents, server: Server | None, drop: set[str]) -> None:
    """One message for all that would be lost, and for names in `drop` that nothing has."""
    towers = Counter(f.tower for f in contents.modules.values())
    droppable = {*towers, *contents.beside, WHOLE}
    if unknown := sorted(drop - droppable):
        raise ValueError(f"drop={unknown}: there is nothing of that name. What can be dropped: {sorted(droppable)}.")
    kept = {tower: count for tower, count in towers.items() if tower not in drop}
    if server is not None and LANGUAGE_MODEL not in kept:
        raise ValueError(
            f"Nothing of this adapter is in a language model (it acts in {', '.join(kept) or 'nothing'}), and {server.title} takes "
            "LoRA there alone. Merge it, and serve the merged model: model.merge_and_unload().save_pretrained(folder)."
        )
    if not kept:
        raise ValueError(f"drop={sorted(drop)} leaves nothing of the adapter.")
    lost = {name: f"{kind}, which is no update of a weight" for name, kind in contents.beside.items()}
    lost |= _not_taken(contents, kept, server) if server is not None else {}
    if lost := {name: what for name, what in lost.items() if name not in drop}:
        whose = "A LoRA" if server is None else server.title
        elsewhere = "" if server is None or lost.keys() & contents.beside else ", or export with target='peft'"
        raise ValueError(
            f"{whose} has no place for a part of this adapter: "
            + "; ".join(f"{name!r}: {what}" for name, what in lost.items())
            + f". Nothing was written. To leave it out, and change what the model computes: drop={sorted({*drop, *lost})}. To "
            f"keep it, serve the adapter with transformers{elsewhere}."
        )
    if server is not None and (others := sorted(kept.keys() - {LANGUAGE_MODEL})):
        warnings.warn(f"LoRA in the {' and the '.join(map(_called, others))}: {server.towers_note}.", stacklevel=3)


def _check_finite(modules: Mapping[str, Factors]) -> None:
    if wrong := [path for path, f in modules.items() if not (f.A.isfinite().all() and f.B.isfinite().all())]:
        dtype = str(modules[wrong[0]].B.dtype).removeprefix("torch.")
        raise ValueError(
            f"The update of {len(wrong)} of {len(modules)} modules ({wrong[0]}) is not finite in {dtype}. Either the adapter holds NaN "
            "or infinite numbers, and an earlier checkpoint has to be taken; or its numbers are too large for this dtype, and "
            "model.float() before the export helps."
        )


def _not_taken(contents: Contents, towers: Mapping[str, int], server: Server) -> dict[str, str]:
    """{what `drop` calls it: what it is} of what a LoRA can hold and this server doesn't take."""
    lost: dict[str, str] = {}
    modules = sorted({key.rpartition(".")[0] for key in contents.whole})
    if not {path.rpartition(".")[2] for path in modules} <= server.whole:
        lost[WHOLE] = f"modules that are trained whole ({', '.join(modules)})"
    if server.other_towers != "conditional":
        lost |= {t: f"LoRA in {n} modules of the {_called(t)}" for t, n in towers.items() if t != LANGUAGE_MODEL}
    return lost


def _called(tower: str) -> str:
    return tower if tower == CONNECTOR else f"{tower} tower"


def _peft_files(base: nn.Module, modules: dict[str, Factors]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Every module with its own rank, under its path; the most frequent rank is the config's."""
    r = Counter(f.rank for f in modules.values()).most_common(1)[0][0]
    ends = _ends(plain_path(path) for path, _ in base.named_modules())
    pattern = {f"^{re.escape(path)}" if path in ends else path: f.rank for path, f in modules.items() if f.rank != r}
    tensors: dict[str, Tensor] = {}
    for path, factors in modules.items():
        if factors.is_read:
            if not factors.base._qkv_same_embed_dim:
                raise ValueError(
                    f"{path}: PEFT has no LoRA for nn.MultiheadAttention with kdim or vdim. Merge the adapter instead."
                )
            # PEFT's LoRA of such an attention has one of its output projection, too.
            d, out = factors.base.embed_dim, f"{path}.base_layer.out_proj"
            tensors |= _pair(out, factors.A.new_zeros(factors.rank, d), factors.B.new_zeros(d, factors.rank))
        tensors |= _pair(path, factors.A, factors.B)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        # PEFT takes a name for the end of a path; a pattern has to match all of it.
        target_modules="|".join(map(re.escape, modules)) if ends & modules.keys() else sorted(modules),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=any(isinstance(f.base, Conv1D) for f in modules.values()),
    )
    return config, tensors


def _server_files(base: nn.Module, modules: dict[str, Factors], server: Server) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Every module with the same rank, that the server has room for, under its name in the released checkpoint."""
    largest = max(modules.values(), key=lambda f: f.rank)
    r = server.rank_for(largest.rank)
    if r is None:
        raise ValueError(
            f"The LoRA of {largest.path} has rank {largest.rank} (a matrix that holds several has their ranks together), and "
            f"{server.title} takes at most {server.ranks[-1]}. Merge the adapter: model.merge_and_unload().save_pretrained(folder)."
        )
    names = released_names(base, modules)
    if stuck := [path for path, f in modules.items() if f.is_read or names[path] is None]:
        raise ValueError(
            f"{', '.join(stuck[:3])}{f' and {len(stuck) - 3} more' if len(stuck) > 3 else ''}: the released checkpoint holds these "
            "weights in another form (fused, or in another order), so no key names their LoRA. Leave out their tower by "
            "drop=[...], export with target='peft', or merge the adapter."
        )
    tensors: dict[str, Tensor] = {}
    for path, factors in modules.items():
        tensors |= _pair(str(names[path]), *factors.padded(r))
    leaves = sorted({str(name).rpartition(".")[2] for name in names.values()})
    return LoraConfig(r=r, lora_alpha=r, target_modules=leaves), tensors


def _ends(paths: Iterable[str]) -> set[str]:
    """What paths end in, whole names and not the paths themselves."""
    return {path.split(".", n)[n] for path in paths for n in range(1, path.count(".") + 1)}


def _pair(path: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{path}.lora_A.weight": A.detach().cpu().contiguous(),
        f"{PREFIX}{path}.lora_B.weight": B.detach().cpu().contiguous(),
    }


# --- the config and the card -----------------------------------------------------------------------------------------


def _describe_base(config: LoraConfig, base: Any, configs: list[Any]) -> None:
    config.target_modules = _in_order(config.target_modules)
    config.base_model_name_or_path = configs[0].base_model_name_or_path
    tasks = {c.task_type for c in configs}
    config.task_type = tasks.pop() if len(tasks) == 1 else None
    config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config.inference_mode = True


def _in_order(targets: Any) -> Any:
    """PEFT makes a set of a list, whose order in the file differs from process to process."""
    return sorted(targets) if isinstance(targets, set) else targets


def _write_card(folder: Path, config: LoraConfig, target: str, configs: list[Any], dropped: list[str]) -> None:
    """Says what the folder is and where it is from; what its reader has written beside it stays."""
    file = folder / CARD
    there = file.read_text(encoding="utf-8") if file.is_file() else "---\nlibrary_name: peft\n---\n"
    card = ModelCard(there, ignore_metadata_errors=True)
    base = config.base_model_name_or_path
    base = base if is_hub_id(base) else None
    data: Any = card.data
    data.library_name, data.base_model = "peft", base
    data.tags = sorted({*(data.tags or ()), "lora", "peft-multimodal"})
    methods = {method.title if (method := method_of(c)) else "LoRA" for c in configs}
    lines = [
        f"# LoRA for {f'`{base}`' if base else 'a local model'}",
        f"A LoRA of rank {config.r}, exported by `peft-multimodal` {__version__} from {len(configs)} adapter{'s' * (len(configs) > 1)} of "
        f"{' and '.join(sorted(methods))} for {target}. It is exact, and loads without that package.",
    ]
    if server := SERVERS.get(target):
        lines.append(f"Start: `{server.start.format(rank=config.r)}`")
    if dropped:
        lines.append(f"Left out, so that outputs differ from the adapter's: {', '.join(dropped)}.")
    block = "\n\n".join([BEGIN, *lines, END])
    before, _, rest = card.text.partition(BEGIN)
    ours, _, after = rest.partition(END)
    card.text = before + block + after if ours else "\n\n".join(filter(None, (block, card.text.strip())))
    card.save(file)
