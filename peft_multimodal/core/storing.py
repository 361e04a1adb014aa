"""How a tuner's adapters get into files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .companions import CardNotes, announce_save, record_of
from .storage import fault_of_saving, without_modules_to_save
from .switching import SwitchingTuner, tuner_of
from .weights import WeightsDontFit, checkpoint_keys, fitted, gathered


class StoringTuner(SwitchingTuner):
    """A tuner whose adapters are stored under roles, and loaded strictly: nothing is written before all is checked."""

    scalars: tuple[str, ...] = ()
    """Ends of names of parameters that are one number: 1-D in the model, as FSDP2 shards no scalars, 0-D in the file."""
    owns_token_rows = False
    """Whether an adapter brings the rows of new tokens, so that no embedding is ever saved with it."""

    @classmethod
    def checkpoint_keys(cls, model: nn.Module, adapter_name: str) -> dict[str, str]:
        """{key in the adapter's file: key in the model} for every tensor of an adapter."""
        return checkpoint_keys(model, cls.tuner_layer_cls, adapter_name)

    @classmethod
    def file_of(cls, config: Any) -> Any:
        """What has the `checkpoint_keys`, `scalars`, `prefix` and `owns_token_rows` of an adapter's file: the class itself."""
        return cls

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        if fault := fault_of_saving(model, adapter_name):
            raise ValueError(fault)
        announce_save(model, config, adapter_name)
        return gathered(cls.file_of(config), model, config, adapter_name, state_dict)

    @classmethod
    def save_companions(cls, model: nn.Module, config: Any, adapter_name: str, folder: Path) -> None:
        """Write what stands in the adapter's folder beside its weights and its config."""

    @classmethod
    def card_notes(cls, model: nn.Module, adapter_name: str) -> CardNotes:
        """What the adapter's model card should say beyond what its files say."""
        return CardNotes()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # the stored keys bear no adapter name (which might be a part of a role)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        record = record_of(config)
        try:
            tensors = fitted(cls.file_of(config), model, config, adapter_name, state_dict)
        except WeightsDontFit:
            # PEFT has made the adapter for this file by now, and after this error it calls nothing of ours.
            if record.awaits_weights:
                cls._take_out(model, adapter_name)
            for parameter in record.trained_before:
                parameter.requires_grad_(True)
            raise
        record.awaits_weights, record.trained_before = False, ()
        return tensors

    @classmethod
    def _take_out(cls, model: Any, adapter_name: str) -> None:
        """Leave the model as it was before an adapter was made whose weights then didn't fit."""
        without_modules_to_save(model, adapter_name)
        if set(model.peft_config) == {adapter_name}:
            model.base_model.unload()
        elif any(name != adapter_name and tuner_of(c) is cls for name, c in model.peft_config.items()):
            model.delete_adapter(adapter_name)
        else:  # beside another method's
            model.base_model._take_back(adapter_name)
            model.peft_config.pop(adapter_name)
