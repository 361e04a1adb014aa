"""The model of a policy: the tuners of all its towers' adapters, led as one.

Each tower's adapter is put in by its own method's tuner, under the name `<adapter>-<tower>`, so two towers may have the same
method with other settings. Towards PEFT there is one adapter: one config, one file, one name to switch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import Tensor, nn

from ..core import anatomy
from ..core.checks import check_adapter_name, check_bare
from ..core.companions import own_copy, record_of
from ..core.matching import check_same_base
from ..core.registry import METHODS, tell_peft
from ..core.storage import (
    check_file_has_modules,
    check_modules_to_save,
    is_hub_id,
    without_modules_to_save,
)
from ..core.storing import StoringTuner
from ..core.switching import SwitchingTuner
from ..core.towers import plain
from .config import NAME, TowerPolicy
from .plan import aim

_PREFIX = "base_model.model."  # PEFT's, of every key in a file


class TowerPolicyModel(StoringTuner):
    """Puts in, switches, saves and merges what a [`TowerPolicy`] says, as one adapter."""

    prefix = f"{NAME}_"
    tuner_layer_cls = BaseTunerLayer  # type: ignore[assignment]
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True  # no adapter of a bare model

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_bare(model)
        if isinstance(peft_config, PeftConfig) or getattr(model, "peft_config", None):
            raise ValueError(
                "A TowerPolicy is made on a model without adapters, by policy.apply(model) or get_peft_model(model, policy). Take "
                "the others out first (model = model.unload()), or put them around the policy's model afterwards."
            )
        self.tuners: dict[str, BaseTuner] = {}
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    # --- putting in, taking out --------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name)
        config = own_copy(self.peft_config[adapter_name])
        check_file_has_modules(model, config)
        found = anatomy.describe(model)
        if config.is_loaded:
            check_same_base(config, found)
        aim(model, config)
        check_modules_to_save(model, config)
        trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self.peft_config[adapter_name] = config
        try:
            self._put(adapter_name, config, bool(kwargs.get("low_cpu_mem_usage")))
        except BaseException:
            self._take_back(adapter_name)
            for parameter, flag in trains.items():
                parameter.requires_grad_(flag)
            raise
        base = config.base_model_name_or_path or getattr(model, "name_or_path", None)
        record_of(config).local_base = None if is_hub_id(base) else base
        config.base_signature = {"model_class": found.model_class, "towers": found.signature(), "roles": {}}

    def _put(self, adapter_name: str, config: TowerPolicy, low_cpu_mem_usage: bool) -> None:
        others = [name for name in self.peft_config if name != adapter_name]
        trained = [p for p in self.model.parameters() if p.requires_grad] if others else []
        known = dict(pair for name in others for pair in self.peft_config[name].members(name).values())
        for place, (name, choice) in config.members(adapter_name).items():
            self.model.peft_config = known
            make: Any = dict[Any, Any](PEFT_TYPE_TO_TUNER_MAPPING)[choice.peft_type]
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
                    tuner = make(self.model, {name: choice}, name, low_cpu_mem_usage=low_cpu_mem_usage)
            except ValueError as error:
                raise ValueError(f"TowerPolicy.{place}: {error}") from error
            targets = getattr(choice, "target_modules", None)
            tuner.peft_config, self.tuners[name] = known, tuner
            setattr(config, place, known[name])  # with what the method has filled in
            if not isinstance(tuner, SwitchingTuner):
                known[name].target_modules = targets  # PEFT may have shortened them
            self.targeted_module_names += tuner.targeted_module_names
        self.model.peft_config = self.peft_config
        self._mark_only_adapters_as_trainable(self.model)
        set_additional_trainable_modules(
            model=self.model,
            peft_config=config,
            model_config=self.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        for parameter in trained:
            parameter.requires_grad_(True)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("The methods of a policy's towers put in their own layers.")

    def _take_back(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        if len(self.peft_config) > 1:
            self._delete(adapter_name, config)
            self.model.peft_config = self.peft_config
        else:
            without_modules_to_save(self.model, adapter_name)
            self._unload_and_optionally_merge(merge=False)

    @classmethod
    def _take_out(cls, model: Any, adapter_name: str) -> None:
        if set(model.peft_config) == {adapter_name}:
            model.base_model.unload()
        else:
            model.delete_adapter(adapter_name)

    # --- switching ---------------------------------------------------------------------------------------------------

    def _names(self, adapter_names: str | Sequence[str]) -> list[str]:
        """What the layers call these adapters."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"There is no adapter {unknown[0]!r}; there are {sorted(self.peft_config)}.")
        return [member for name in names for member, _ in self.peft_config[name].members(name).values()]

    def own_layers(self) -> list[Any]:
        own = set(self._names(list(self.peft_config)))
        layers = (m for m in self.model.modules() if isinstance(m, BaseTunerLayer))
        return [layer for layer in layers if own & layer._get_available_adapters()]

    def _wholes(self) -> Iterator[Any]:
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and module._get_available_adapters() & set(
                self.peft_config
            ):
                yield module

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names, active = [adapter_name] if isinstance(adapter_name, str) else adapter_name, self._names(adapter_name)
        for layer in self.own_layers():
            if layer.merged:
                warnings.warn("The adapters are merged, so they are taken out of the weights first.", stacklevel=2)
                layer.unmerge()
            layer.set_adapter(active, inference_mode=inference_mode)
        for whole in self._wholes():
            whole.set_adapter(
                [n for n in names if n in whole._get_available_adapters()][:1], inference_mode=inference_mode
            )
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        members = self._names(adapter_names)
        for layer in self.own_layers():
            layer.set_requires_grad(members, requires_grad)
        for whole in self._wholes():
            whole.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        members = self._names(adapter_name)
        if any(set(members) & set(layer.merged_adapters) for layer in self.own_layers()):
            raise ValueError(f"Adapter {adapter_name!r} is merged: call unmerge_adapter() before it is deleted.")
        self._delete(adapter_name, self.peft_config[adapter_name])
        rest = [name for name in self.active_adapters if name != adapter_name] or list(self.peft_config)[:1]
        self.set_adapter(rest)

    def _delete(self, adapter_name: str, config: TowerPolicy) -> None:
        without_modules_to_save(self.model, adapter_name)
        for whole in self._wholes():
            whole.delete_adapter(adapter_name, new_active_adapters=None)
        for layer in self.own_layers():
            for name, _ in config.members(adapter_name).values():
                if name in layer._get_available_adapters():
                    layer.delete_adapter(name)
                self.tuners.pop(name, None)
        del self.peft_config[adapter_name]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for name in self._names(adapter_name):
            for layer in self.own_layers():  # after weights have been put in place of empty ones
                layer._move_adapter_to_device_of_base_layer(name)
            cast_adapter_dtype(self.model, name, autocast_adapter_dtype)

    # --- merging -----------------------------------------------------------------------------------------------------

    def _merged(self, adapter_names: list[str] | None, safe: bool) -> list[str]:
        """What the layers call the adapters that are to be merged, once nothing is in the way of it."""
        names = self._names(self.active_adapters if adapter_names is None else adapter_names)
        for name in names:
            tuner: Any = self.tuners[name]
            tuner.check_merge([name], safe) if isinstance(tuner, SwitchingTuner) else tuner._check_merge_allowed()
        self._check_untied()
        return names

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        BaseTuner.merge_adapter(self, self._merged(adapter_names, safe_merge), safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        names = self._merged(adapter_names, safe_merge)
        return self._unload_and_optionally_merge(progressbar=progressbar, safe_merge=safe_merge, adapter_names=names)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        for name in list(self.peft_config) if not merge else ():  # PEFT would leave what has trained whole
            without_modules_to_save(self.model, name, alone=False)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    # --- the file ----------------------------------------------------------------------------------------------------

    @classmethod
    def checkpoint_keys(cls, model: Any, adapter_name: str) -> dict[str, str]:
        """Each tower's keys, behind the tower's name: `base_model.model.text/...`."""
        keys: dict[str, str] = {}
        for place, (name, config) in model.peft_config[adapter_name].members(adapter_name).items():
            tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
            find = tuner.checkpoint_keys if issubclass(tuner, StoringTuner) else _stock_keys
            for stored, key in find(model, name).items():
                keys[f"{_PREFIX}{place}/{stored.removeprefix(_PREFIX)}"] = key
        return keys

    @classmethod
    def file_of(cls, config: Any) -> Any:
        scalars = tuple(end for method in METHODS.values() for end in method.model.scalars)
        return SimpleNamespace(
            checkpoint_keys=cls.checkpoint_keys, scalars=scalars, prefix=cls.prefix, owns_token_rows=False
        )


def _stock_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """{key in the file: key in the model} of one of PEFT's own adapters."""
    present, keys = model.state_dict().keys(), {}
    for path, module in model.named_modules():
        for container_name in (
            module.adapter_layer_names + module.other_param_names if isinstance(module, BaseTunerLayer) else ()
        ):
            container = getattr(module, container_name, None)
            if (
                not isinstance(container, (nn.ModuleDict, nn.ParameterDict, BufferDict))
                or adapter_name not in container
            ):
                continue
            item = container[adapter_name]
            for tail in [""] if isinstance(item, Tensor) else [f".{name}" for name in item.state_dict()]:
                key = f"{path}.{container_name}.{adapter_name}{tail}"
                if key in present:
                    keys[f"{plain(path)}.{container_name}{tail}"] = key
    return keys


tell_peft(NAME, TowerPolicy, TowerPolicyModel)
