"""What becomes of adapters that a model has: switched, deleted, merged, served row by row, taken out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from . import anatomy
from .parts import AttachedPart, CallScope, InputGradients, MultimodalLayer, rows_in
from .registry import METHODS, method_of
from .storage import without_modules_to_save


class SwitchingTuner(BaseTuner):
    """A tuner that shares its model with tuners of other methods: each switches and deletes its own adapters alone."""

    model: Any  # the wrapped Hugging Face model
    peft_config: dict[str, Any]  # {adapter name: config}, also those of other methods
    tuner_layer_cls: type[MultimodalLayer]
    not_mergeable: str | None = None
    """Why this method's adapters can't be merged and what to do instead; None where they are weight updates."""

    def own_layers(self) -> list[MultimodalLayer]:
        """All that this method has put into the model."""
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def attached_parts(self, of: type[MultimodalLayer] | None = None) -> Iterator[tuple[nn.Module, str, AttachedPart]]:
        """(parent, name, part) of every part that wraps nothing, of this method or `of` another."""
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, AttachedPart) and isinstance(child, of or self.tuner_layer_cls):
                    yield parent, name, child

    def own_adapters(self) -> list[str]:
        """Names of this method's adapters."""
        return sorted(name for name, config in self.peft_config.items() if tuner_of(config) is type(self))

    def whole_modules(self, of_others: bool = False) -> list[AuxiliaryTrainingWrapper]:
        """The modules that are trained as a whole beside this method's adapters (`modules_to_save`), or beside others'."""
        own = set(self.own_adapters())
        wrappers = {
            m: m._get_available_adapters() for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)
        }
        # One that has lost its last copy is nobody's.
        return [m for m, names in wrappers.items() if (bool(names) and names.isdisjoint(own)) == of_others]

    def get_input_embeddings(self) -> nn.Module | None:
        """The model's; None where transformers finds no such one (CLIP). accelerate's FSDP2 asks every model for it."""
        with suppress(NotImplementedError):
            return self.model.get_input_embeddings()
        return None

    # --- rows of a batch ---------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else self.rows(names, [*args, *kwargs.values()], copies_of_rows(kwargs)):
            yield

    def rows(
        self, adapter_names: Sequence[str], inputs: Collection[Any], copies: int = 1
    ) -> AbstractContextManager[None]:
        """A context within which row i of a batch, of which these are inputs, has the adapter `adapter_names[i]`, and so
        have the copies of it that generation makes."""
        scopes = self.row_scopes()
        if scopes is None:
            raise ValueError(
                f"{type(self).__name__} has one adapter for the whole batch: adapter_names=[...] isn't supported. Call "
                "model.set_adapter(name) and pass the rows of each adapter separately."
            )
        return rows_in(self.model, scopes, adapter_names, self.peft_config, inputs, copies)

    def row_scopes(self) -> list[CallScope] | None:
        """Those by which the method's parts learn the adapter of each row; None where it can't serve rows of several."""
        return None

    # --- switching, deleting -----------------------------------------------------------------------------------------

    def _check_own(self, adapter_names: Collection[str]) -> None:
        """Refuse names of adapters that another call of `get_peft_model` put on the same model."""
        for name in adapter_names:
            config = self.peft_config.get(name)
            if config is not None and tuner_of(config) is not type(self):
                raise ValueError(
                    f"Adapter {name!r} is of another method ({config.peft_type.value}): the PeftModel that it was made or "
                    "loaded by switches and deletes it. unload() and disable_adapter() of either serve both."
                )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._check_own([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        others = [
            (m, m.active_adapters, {p: p.requires_grad for p in m.parameters()}) for m in self.whole_modules(True)
        ]
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for wrapper, active, trains in others:  # PEFT has switched off whatever has no copy of this adapter's
            wrapper._active_adapter = active
            for parameter, flag in trains.items():
                parameter.requires_grad_(flag)

    def delete_adapter(self, adapter_name: str) -> None:
        self._check_own([adapter_name])
        without_modules_to_save(self.model, adapter_name)
        beside = {m: m.active_adapters for m in self.whole_modules()}
        was, rest = self.active_adapters, [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        for _, _, part in self.attached_parts():  # PEFT's loop passes over modules that bear the prefix
            part.delete_adapter(adapter_name)
        self.active_adapter = rest or (self.own_adapters()[:1] if adapter_name in was else [])
        for layer in self.own_layers() if adapter_name in was else ():  # each has chosen among those that it has
            layer.set_adapter(self.active_adapter)
        for wrapper, names in beside.items():  # PEFT has switched off those that have lost a copy
            if adapter_name in names:
                wrapper.set_adapter([n for n in self.active_adapter if n in wrapper._get_available_adapters()])
            else:
                wrapper._active_adapter = names

    # --- merging, taking out -----------------------------------------------------------------------------------------

    def _check_mergeable(self) -> None:
        for tuner in [type(self), *map(tuner_of, self.peft_config.values())]:
            if reason := getattr(tuner, "not_mergeable", None):
                raise ValueError(reason)
        self._check_untied()

    def check_merge(self, adapter_names: list[str], safe: bool) -> None:
        """Refuse to merge these adapters of this method where that can't be, before any weight is touched."""
        self._check_mergeable()

    def _check_untied(self) -> None:
        """Refuse to merge into a weight that another module uses, too."""
        users: dict[int, list[tuple[str, nn.Module]]] = {}
        for path, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), []).append((path, module))
        layers = [(path, m) for path, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)]
        for path, layer in layers:
            inside = set(self.model.get_submodule(path).modules())
            for parameter in anatomy.unwrap(layer).parameters() if hasattr(layer, "base_layer") else ():
                if others := [user for user, module in users[id(parameter)] if module not in inside]:
                    raise ValueError(
                        f"{path} shares its weight with {others[0]} (they are tied), so a merge would change both, and give another "
                        f"model than the adapter does. Keep the adapter, or wrap the model again with exclude_modules=[{path!r}]; to "
                        "adapt and merge this module, load the base untied: tie_word_embeddings=False in its config."
                    )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._check_mergeable()
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        self._check_mergeable()
        return super().merge_and_unload(*args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Whether an adapter, or all that are active, is a LoRA and nothing beside it, as `export_lora` writes it."""
        names = self.active_adapters if adapter_name is None else [adapter_name]
        methods = [method_of(self.peft_config[name]) for name in names]
        beside = (layer for layer in self.own_layers() if layer.no_lora is not None)
        return all(m is not None and m.promises.lora for m in methods) and not any(
            layer.has_adapter(name) for layer in beside for name in names
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT would hand over a weight, which a whole layer doesn't have

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Takes out every adapter, as PEFT does, also those of other methods."""
        parts = list(self.attached_parts(MultimodalLayer))
        for name in list(self.peft_config) if not merge else ():  # PEFT would leave what has trained whole
            without_modules_to_save(self.model, name, alone=False)
        super()._unload_and_optionally_merge(merge, *args, **kwargs)
        while any(isinstance(m, BaseTunerLayer) and hasattr(m, "base_layer") for m in self.model.modules()):
            super()._unload_and_optionally_merge(merge=False)  # PEFT passes over layers inside of layers
        for method in METHODS.values():
            method.model.drop_traces(self.model)
        for module in self.model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, InputGradients):
                    del module._forward_hooks[key]
        detach(parts)
        return self.model

    def _take_back(self, adapter_name: str) -> None:
        """After a failure in the midst of an injection, such as no memory: the model is what it was before."""
        without_modules_to_save(self.model, adapter_name)
        for layer in self.own_layers():
            layer.delete_adapter(adapter_name)
        if any(name != adapter_name for name in self.own_adapters()):
            return  # the layers are the other adapters', too
        detach(list(self.attached_parts()))
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, self.tuner_layer_cls):
                    setattr(parent, name, child.get_base_layer())
        self.drop_traces(self.model)

    @classmethod
    def drop_traces(cls, model: nn.Module) -> None:
        """Remove what a method has left on modules beside its layers and parts."""


def copies_of_rows(options: Mapping[str, Any]) -> int:
    """How many rows `generate` makes of one with these options: beams, or sequences."""
    config = options.get("generation_config")
    names = ("num_beams", "num_return_sequences")
    return max(options.get(name) or getattr(config, name, None) or 1 for name in names)


def detach(parts: list[tuple[nn.Module, str, AttachedPart]]) -> None:
    """Take attached parts out of a model; who took a forward over last gives it back first."""
    for parent, name, part in reversed(parts):
        part.remove_hooks()
        delattr(parent, name)


def tuner_of(config: Any) -> type | None:
    """The class of a config's model; None for methods that are PEFT's own."""
    tuner: Any = dict[Any, Any](PEFT_TYPE_TO_TUNER_MAPPING).get(config.peft_type)
    return tuner if isinstance(tuner, type) and issubclass(tuner, SwitchingTuner) else None


def adapters_of(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, config) of a model's adapters as its layers know them: of a policy, the adapter of each tower."""
    for name, config in getattr(model, "peft_config", {}).items():
        members = getattr(config, "members", None)
        yield from [(name, config)] if members is None else members(name).values()


def layer_names(config: Any, adapter_name: str) -> list[str]:
    """What the layers call an adapter: its name, or of a policy a name for each tower."""
    members = getattr(config, "members", None)
    return [adapter_name] if members is None else [name for name, _ in members(adapter_name).values()]


def adapter_towers(model: Any) -> dict[str, str]:
    """{name: tower} of the adapters that a policy keeps to one tower."""
    configs = getattr(model, "peft_config", {}).items()
    policies = [config.members(name) for name, config in configs if hasattr(config, "members")]
    return {name: tower for members in policies for tower, (name, _) in members.items()}
