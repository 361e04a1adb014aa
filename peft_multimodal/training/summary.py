"""What is printed when training ends."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..core.registry import method_of
from ..core.switching import adapters_of


def summary(model: Any, state: Any, saved: Path | None) -> str:
    """What was trained, how much, where it is saved, and what to do next.

    Args:
        model: A `PeftModel`, or one that was trained without adapters.
        state: The Trainer's, at the end of training.
        saved: The checkpoint whose weights the model has; None where it has none.
    """
    model = getattr(model, "module", model)  # of a distributed wrapper
    return "\n".join([*_trained(model), _effort(state), *_saved(model, saved)])


def _trained(model: Any) -> list[str]:
    """A line for each adapter that was trained, or one for the model itself."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    configs = dict(adapters_of(model))
    adapters = {name: sum(size for path, size in sizes.items() if name in path.split(".")) for name in configs}
    if not any(adapters.values()):
        return [f"Trained {sum(sizes.values()):,} parameters of {type(model).__name__}."]
    total = sum(p.numel() for p in model.parameters())
    return [
        f"Trained the adapter {name!r} ({_method(configs[name])}): {size:,} of {total:,} parameters ({100 * size / total:.2g} %)."
        for name, size in adapters.items()
        if size
    ]


def _method(config: Any) -> str:
    method = method_of(config)
    return method.title if method is not None else str(getattr(config.peft_type, "value", config.peft_type))


def _effort(state: Any) -> str:
    parts = [f"{state.global_step:,} steps"]
    if state.epoch is not None:
        parts.append(f"{state.epoch:.3g} epochs")
    run = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), None)
    if run is not None:
        parts += [f"{run['train_runtime']:,.0f} seconds", f"mean loss {run['train_loss']:.4g}"]
    return ", ".join(parts) + "."


def _saved(model: Any, saved: Path | None) -> list[str]:
    """Where it is, and the command that looks at it; the call that saves it where it isn't."""
    if not hasattr(model, "peft_config"):
        return [f"Saved in {saved}."] if saved is not None else ['Not saved yet. Next: trainer.save_model("my-model")']
    name = model.active_adapters[0]
    folders = () if saved is None else (saved, saved / name)
    folder = next((folder for folder in folders if (folder / CONFIG_NAME).is_file()), None)
    if folder is None:
        return ['Not saved yet. Next: model.save_pretrained("my-adapter")']
    base = model.peft_config[name].base_model_name_or_path or "MODEL"
    command = shlex.join(["python", "-m", "peft_multimodal", "doctor", base, str(folder)])
    return [f"Saved in {folder}. Next: {command}"]
