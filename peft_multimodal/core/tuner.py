"""What must be identical in every method: the config's common fields, injection, switches, storage.

A method subclasses `MultimodalConfig`, `MultimodalTuner` and, in `parts.py`, `MultimodalLayer`. It gets from here

- `target_modules` in PEFT's forms, scoped by `towers=`, with an error that names what exists;
- adapters stored under roles (`vision.q.3`) instead of module paths, checked strictly when they are loaded;
- parts that are attached to a module instead of wrapping it (shared factors, hooks), removed by `unload()`;
- `disable_adapter()` that leaves every `requires_grad` as it was.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from peft import NoMatchingPeftModuleError, PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..model_card import CardNotes, is_hub_id
from . import anatomy
from .anatomy import Anatomy, Site
from .config import MultimodalConfig
from .matching import (
    MatchTable,
    check_same_base,
    fold,
    in_layers,
    is_among,
    left_out,
    nothing_matched,
)
from .parts import AttachedPart, InputGradients, MultimodalLayer
from .registry import METHODS
from .storage import (
    check_around,
    check_below,
    check_file_has_modules,
    check_modules_to_save,
    copied,
    fault_of_saving,
    faults,
    without_modules_to_save,
)

_PEFT_PREFIX = "base_model.model."
# Folders that stand beside the files of an adapter: with its own name for a folder, another one's would lie among them.
COMPANIONS = ("encoder", "tokenizer")
_WHOLE = re.compile(r"modules_to_save\.[^.]+\.")
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


class MultimodalTuner(BaseTuner):
    """Base of the five methods' models: scoping by towers, strict storage by roles, attached parts."""

    model: Any  # the wrapped Hugging Face model
    peft_config: dict[str, Any]  # {adapter name: config}, of the method's config class
    tuner_layer_cls: type[MultimodalLayer]
    target_module_mapping: dict[str, list[str]] = {}
    not_mergeable: str | None = None
    """Why this method's adapters can't be merged and what to do instead; None where they are weight updates."""
    scalars: tuple[str, ...] = ()
    """Ends of names of parameters that are one number: 1-D in the model, as FSDP2 shards no scalars, 0-D in the file."""
    places = "it has no weight matrices"
    """Why a model may have no place for this method; ends the sentence "Nothing in it can be adapted"."""
    owns_token_rows = False
    """Whether an adapter brings the rows of new tokens, so that no embedding is ever saved with it."""
    learning_rates: tuple[float, float] | None = None
    """From where to where a method's learning rate is sane, for optimizers of Adam's kind."""
    not_beside: dict[str, str] = {}
    """{PEFT type of another method: why no model can have both, and what to do instead}."""
    wraps = False
    """Whether it puts layers around modules, which moves what is inside; not where its parts hang below modules."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_bare(model)
        outer, model = model, anatomy.base_model(model)  # a model that has adapters of another method
        present = getattr(model, "peft_config", None) or {}
        if isinstance(peft_config, PeftConfig):  # a PeftModel passes {name: config}
            if not present:
                vars(model).pop("_hf_peft_config_loaded", None)  # transformers has set it before it asked
            kept = (
                "shared state, which its layers read,"
                if self.uses_shared_state
                else "what it hangs beside frozen modules"
            )
            raise ValueError(
                f"{type(peft_config).__name__} isn't injected into a bare model (inject_adapter_in_model, and add_adapter and "
                f"load_adapter of a transformers model): {kept} couldn't be loaded, deleted and taken out again there. Use "
                "get_peft_model(model, config), and peft_multimodal.load(model, folder) or PeftModel.from_pretrained; the PeftModel's own add_adapter and load_adapter add more."
            )
        check_below(outer, model)
        self._check_beside(present, peft_config[adapter_name], adapter_name)
        training = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            present.pop(adapter_name, None)  # it is shared with the model's other adapters, which stay as they are
            for parameter in training:
                parameter.requires_grad_(True)
            raise

    @classmethod
    def _check_beside(cls, present: dict[str, Any], config: Any, adapter_name: str) -> None:
        """Refuse what a model's adapters, of earlier calls of `get_peft_model`, leave no room for."""
        for name, other in present.items():
            if name == adapter_name:
                raise ValueError(
                    f"The model has an adapter {name!r} already ({other.peft_type.value}). Take it out first by its "
                    "PeftModel's unload(), or call the new one otherwise: get_peft_model(model, config, "
                    f"adapter_name={name + '-2'!r})."
                )
            reason = cls.not_beside.get(other.peft_type) or getattr(tuner_of(other), "not_beside", {}).get(
                config.peft_type
            )
            if reason:
                raise ValueError(reason)

    # --- matching ----------------------------------------------------------------------------------------------------

    @classmethod
    def candidates(cls, config: Any, model: nn.Module, found: Anatomy) -> list[Any]:
        """What this method can adapt: by default any matrix."""
        return found.matrices

    @classmethod
    def default_targets(cls, config: Any, candidates: list[Any]) -> list[Any]:
        """What `target_modules=None` means for this method."""
        raise NotImplementedError

    @classmethod
    def match(cls, config: Any, model: nn.Module) -> list[Site]:
        """The matrices that `config` selects in `model`, in the model's order; an error names what exists."""
        found = anatomy.describe(model)
        candidates = cls.candidates(config, model, found)
        wanted = config.towers or None
        roles = (config.base_signature or {}).get("roles") if config.is_loaded else None
        if roles:
            return [m for m in candidates if is_among(m, roles)]  # names may have changed since, roles have not
        if config.target_modules is None:
            unread = () if config.layers_to_transform is not None else anatomy.unread_layers(model, found)
            read = [m for m in candidates if anatomy.layer_of(m.module) not in unread]
            selected = cls.default_targets(config, read)
        elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            head = getattr(anatomy.base_model(model), "get_output_embeddings", lambda: None)()
            heads = {p for p, m in anatomy.base_model(model).named_modules() if head is not None and m is head}
            selected = [m for m in candidates if m.module not in heads]
        else:
            selected = [m for m in candidates if check_target_module_exists(config, m.module)]
        selected = [m for m in selected if (wanted is None or m.tower in wanted) and not left_out(config, m.module)]
        selected = [m for m in selected if in_layers(config, m.module)]
        if not selected:
            raise NoMatchingPeftModuleError(nothing_matched(config, found, candidates, cls.places))
        return selected

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        """Match once, before anything is changed; `target_modules` stays what the user wrote."""
        check_file_has_modules(self.model, peft_config)
        found = anatomy.describe(self.model)
        if peft_config.is_loaded:
            check_same_base(peft_config, found)
        check_modules_to_save(self.model, peft_config)
        matrices = self.match(peft_config, self.model)
        self._check_reach(matrices)
        self._check_wholes(peft_config)
        self.check_model(peft_config, matrices, found)
        if not peft_config.is_loaded:
            self._say_what_is_unread(peft_config, matrices, found)
        base = peft_config.base_model_name_or_path or getattr(self.model, "name_or_path", None)
        peft_config._local_base = None if is_hub_id(base) else base
        adapted = {m.tower for m in matrices}
        peft_config.base_signature = {
            "model_class": found.model_class,
            "towers": {name: size for name, size in found.signature().items() if name in adapted},
            "roles": fold(matrices),
        }
        by_module: dict[str, list[Any]] = {}
        for matrix in matrices:
            by_module.setdefault(matrix.module, []).append(matrix)
        self._matched = by_module
        return peft_config

    def _say_what_is_unread(self, config: Any, matrices: list[Site], found: Anatomy) -> None:
        unread = anatomy.unread_layers(self.model, found)
        if not unread or not any(m.tower == "vision" for m in matrices):
            return
        adapted = [p for p in unread if any(anatomy.is_below(m.module, p) for m in matrices)]
        names = ", ".join(adapted or unread)
        what = (
            f"The adapter has parts there that won't train; target_modules=None leaves {'them' if len(unread) > 1 else 'it'} out."
            if adapted
            else "The adapter has nothing there."
        )
        warnings.warn(
            f"{found.model_class} reads its image features from an earlier layer of the vision tower (vision_feature_layer in "
            f"its config): {names} gets no gradient. {what}",
            stacklevel=2,
        )

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        with suppress(NotImplementedError):  # a model without `get_input_embeddings` has nothing tied to it
            super()._check_tied_modules(model, peft_config)

    def _check_reach(self, matrices: list[Site]) -> None:
        """Refuse modules inside layers that another method has wrapped: PEFT passes over what is inside."""
        wrapped = {
            path: module
            for path, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer")
        }
        for path, wrapper in wrapped.items():
            inside = next((m.module for m in matrices if m.module.startswith(f"{path}.")), None)
            if inside is not None and not isinstance(wrapper, self.tuner_layer_cls):
                raise ValueError(
                    f"{inside} lies inside a layer that {type(wrapper).__name__} has wrapped, where PEFT puts no adapter. Make or "
                    "load this adapter first and the other one after it."
                )

        if self.wraps:
            method = type(self).__name__.removesuffix("Model")
            check_around(self.model, list(dict.fromkeys(m.module for m in matrices)), self.tuner_layer_cls, method)

    def _check_wholes(self, config: Any) -> None:
        """Refuse to train a module as a whole that another method trains: one of the two copies alone would act."""
        others = {id(m) for m in self._wholes(True)}
        for path, module in self.model.named_modules():
            if id(module) in others and path.endswith(tuple(config.modules_to_save or ())):
                raise ValueError(
                    f"modules_to_save: {path} is trained by the adapter of another method already, and one copy alone can "
                    "act. Leave it out here, or train it with this adapter alone."
                )

    def check_model(self, config: Any, matrices: list[Any], found: Anatomy) -> None:
        """Refuse what this method can't do on this model, before the model is touched."""

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        return _ExcludedModule() if left_out(peft_config, key) else key in self._matched

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Nothing to hand over: layers go to their host's device themselves, and one that is taken out is as it was.
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        written = config.target_modules
        had_it = any(layer.has_adapter(adapter_name) for layer in self._own_layers())
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            if not had_it:
                self._take_back(adapter_name)
            raise
        finally:
            config.target_modules = written  # PEFT writes "all-linear" out into names, which a rename would break
        for path in [*anatomy.token_embeddings(model), *anatomy.pixel_readers(model)]:
            reader = model.get_submodule(path)
            if not any(isinstance(hook, InputGradients) for hook in reader._forward_hooks.values()):
                reader.register_forward_hook(InputGradients(model))

    def _own_layers(self) -> list[MultimodalLayer]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _take_back(self, adapter_name: str) -> None:
        """After a failure in the midst of an injection, such as no memory: the model is what it was before."""
        without_modules_to_save(self.model, adapter_name)
        for layer in self._own_layers():
            layer.delete_adapter(adapter_name)
        if any(name != adapter_name and tuner_of(c) is type(self) for name, c in self.peft_config.items()):
            return  # the layers are the other adapters', too
        for parent, name, part in reversed(list(self.attached_parts())):
            part.remove_hooks()
            delattr(parent, name)
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, self.tuner_layer_cls):
                    setattr(parent, name, child.get_base_layer())
        self.drop_traces(self.model)

    def get_input_embeddings(self) -> nn.Module | None:
        """The model's; None where transformers finds no such one (CLIP). accelerate's FSDP2 asks every model for it."""
        with suppress(NotImplementedError):
            return self.model.get_input_embeddings()
        return None

    # --- rows of a batch ---------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else self.rows(names, [*args, *kwargs.values()]):
            yield

    def rows(self, adapter_names: Sequence[str], inputs: Collection[Any]) -> AbstractContextManager[None]:
        """A context within which row i of a batch, of which these are inputs, has the adapter `adapter_names[i]`."""
        raise ValueError(
            f"{type(self).__name__} has one adapter for the whole batch: adapter_names=[...] isn't supported. Call "
            "model.set_adapter(name) and pass the rows of each adapter separately."
        )

    # --- attached parts ----------------------------------------------------------------------------------------------

    def attached_parts(self, of: type[MultimodalLayer] | None = None) -> Iterator[tuple[nn.Module, str, AttachedPart]]:
        """(parent, name, part) of every part that wraps nothing, of this method or `of` another."""
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, AttachedPart) and isinstance(child, of or self.tuner_layer_cls):
                    yield parent, name, child

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
        others = [(m, m.active_adapters, {p: p.requires_grad for p in m.parameters()}) for m in self._wholes(True)]
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for wrapper, active, trains in others:  # PEFT has switched off whatever has no copy of this adapter's
            wrapper._active_adapter = active
            for parameter, flag in trains.items():
                parameter.requires_grad_(flag)

    def delete_adapter(self, adapter_name: str) -> None:
        self._check_own([adapter_name])
        without_modules_to_save(self.model, adapter_name)
        beside = {m: m.active_adapters for m in self._wholes()}
        was, rest = self.active_adapters, [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        for _, _, part in self.attached_parts():  # PEFT's loop passes over modules that bear the prefix
            part.delete_adapter(adapter_name)
        self.active_adapter = rest or (self._own_adapters()[:1] if adapter_name in was else [])
        for layer in self._own_layers() if adapter_name in was else ():  # each has chosen among those that it has
            layer.set_adapter(self.active_adapter)
        for wrapper, names in beside.items():  # PEFT has switched off those that have lost a copy
            if adapter_name in names:
                wrapper.set_adapter([n for n in self.active_adapter if n in wrapper._get_available_adapters()])
            else:
                wrapper._active_adapter = names

    def _own_adapters(self) -> list[str]:
        return sorted(name for name, config in self.peft_config.items() if tuner_of(config) is type(self))

    def _wholes(self, of_others: bool = False) -> list[AuxiliaryTrainingWrapper]:
        """The modules that are trained as a whole beside this method's adapters (`modules_to_save`), or beside others'."""
        own = set(self._own_adapters())
        wrappers = (m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper))
        return [m for m in wrappers if _is_of_others(m._get_available_adapters(), own) == of_others]

    def _check_mergeable(self) -> None:
        for tuner in [type(self), *map(tuner_of, self.peft_config.values())]:
            if reason := getattr(tuner, "not_mergeable", None):
                raise ValueError(reason)
        self._check_untied()

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
                        f"model than the adapter does. Keep the adapter, or wrap the model anew with exclude_modules=[{path!r}]; to "
                        "adapt and merge this module, load the base untied: tie_word_embeddings=False in its config."
                    )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._check_mergeable()
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        self._check_mergeable()
        return super().merge_and_unload(*args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        """Takes out every adapter, as PEFT does, also those of other methods."""
        parts = list(self.attached_parts(MultimodalLayer))
        super()._unload_and_optionally_merge(*args, **kwargs)
        while any(isinstance(m, BaseTunerLayer) and hasattr(m, "base_layer") for m in self.model.modules()):
            super()._unload_and_optionally_merge(merge=False)  # PEFT passes over layers inside of layers
        for method in METHODS.values():
            method.model.drop_traces(self.model)
        for module in self.model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, InputGradients):
                    del module._forward_hooks[key]
        for parent, name, part in reversed(parts):  # who took a forward over last gives it back first
            part.remove_hooks()
            delattr(parent, name)
        return self.model

    @classmethod
    def drop_traces(cls, model: nn.Module) -> None:
        """Remove what a method has left on modules beside its layers and parts."""

    # --- storage -----------------------------------------------------------------------------------------------------

    @classmethod
    def checkpoint_keys(cls, model: nn.Module, adapter_name: str) -> dict[str, str]:
        """{key in the adapter's file: key in the model} for every tensor of an adapter.

        `model.vision_tower.layers.3.self_attn.q_proj.<prefix>P_norm.default` is stored as
        `base_model.model.vision.q.3.<prefix>P_norm`: no module path, no adapter name.
        """
        keys: dict[str, str] = {}
        for path, module in model.named_modules():
            if not isinstance(module, cls.tuner_layer_cls):
                continue
            path = _WRAPPERS.sub("", path)
            for container_name in module.adapter_layer_names + module.other_param_names:
                container = getattr(module, container_name)
                if not isinstance(container, (nn.ModuleDict, nn.ParameterDict)) or adapter_name not in container:
                    continue
                item = container[adapter_name]
                inside = [""] if isinstance(item, Tensor) else [f".{name}" for name in item.state_dict()]
                role = f"{module.role}." if module.role else ""
                for tail in inside:
                    model_key = ".".join(filter(None, (path, container_name, adapter_name))) + tail
                    keys[f"{_PEFT_PREFIX}{role}{container_name}{tail}"] = model_key
        return keys

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        if fault := fault_of_saving(model, adapter_name):
            raise ValueError(fault)
        state_dict = {_WRAPPERS.sub("", key): value for key, value in state_dict.items()}
        config._card = (adapter_name, card_notes(model, adapter_name))  # this comes before the config is saved
        keys = cls.checkpoint_keys(model, adapter_name)
        if not state_dict.keys() >= set(keys.values()):
            # PEFT has dropped keys that contain another adapter's name, which may be a part of a module path.
            state_dict = {_WRAPPERS.sub("", key): value for key, value in model.state_dict().items()} | state_dict
        found = {stored: state_dict[key] for stored, key in keys.items()}
        for stored, value in found.items():
            if stored.endswith(cls.scalars) and not hasattr(value, "full_tensor"):  # a shard keeps its dimension
                found[stored] = value.reshape(())
        return _Gathered(found, config, state_dict if cls.owns_token_rows else ())

    def card_notes(self, adapter_name: str) -> CardNotes:
        """What the adapter's model card should say beyond what its files say."""
        return CardNotes()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # the stored keys bear no adapter name (which might be a part of a role)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        own = model.state_dict()
        real = {_WRAPPERS.sub("", key): key for key in own}  # parts of the model may be compiled
        expected = {stored: real[key] for stored, key in cls.checkpoint_keys(model, adapter_name).items()}
        stored, others = {}, {}
        for key, value in state_dict.items():
            canonical = _PEFT_PREFIX + key.removeprefix(_PEFT_PREFIX)
            if canonical in expected:
                stored[canonical] = value[None] if canonical.endswith(cls.scalars) and not value.ndim else value
            else:
                others[key] = value
        problems = [f"missing: {_some(expected.keys() - stored.keys())}"] if expected.keys() - stored.keys() else []
        if extra := [k for k in others if k not in own and _PEFT_PREFIX + k not in own]:
            problems.append(f"not of this adapter: {_some(extra)}")
        for key, value in stored.items():
            problems += faults(_short(key), value, own[expected[key]])
        others = {key if key in own else _PEFT_PREFIX + key: value for key, value in others.items()}
        buffers = {key for key, _ in model.named_buffers(remove_duplicate=False)}
        for key, value in others.items():
            if key in own:
                problems += faults(_WHOLE.sub("", _short(key)), value, own[key], key not in buffers)
        way_out = _resize(model, others)
        if expected and not stored:
            way_out = (
                " None of its keys is this method's: if a Trainer resumes here, give each run an output_dir of its own."
            )
        if problems:
            if config.is_loaded and not config.has_weights:
                cls._take_out(model, adapter_name)
            base = config.base_model_name_or_path or "unknown"
            raise WeightsDontFit(
                f"The weights don't fit adapter {adapter_name!r} ({config.peft_type.value}, trained on {base!r}); nothing "
                f"was loaded. "
                + "; ".join(problems[:6])
                + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
                + f". Load it into the model it was trained on, with the config it was saved with.{way_out}"
            )
        config.has_weights = True
        result = {expected[key]: value for key, value in stored.items()} | copied(model, others)
        return result | _not_missing(model, cls.prefix, adapter_name, result)

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


class WeightsDontFit(ValueError):
    """An adapter's file holds other tensors than the adapter has. Nothing was written."""


class _Gathered(dict[str, Tensor]):
    """An adapter's tensors, to which PEFT adds what else is saved: modules, and embeddings where the base was resized.

    To see whether it was, PEFT asks the Hub for the base's config, unless the base is named by a folder. While PEFT gathers,
    the adapter's config therefore names the folder of the cache that holds this config, or no base.

    Args:
        of_model: Names of the model's tensors, where none of them may be added. Parts that are saved whole
            (`modules_to_save`) come under names of the file's, embeddings under the model's.
    """

    def __init__(self, tensors: dict[str, Tensor], config: MultimodalConfig, of_model: Collection[str]) -> None:
        super().__init__(tensors)
        self._config, self._of_model = config, of_model
        config.hide_base()

    def update(self, other: Any) -> None:  # type: ignore[override]
        super().update({k: v for k, v in other.items() if _WRAPPERS.sub("", k) not in self._of_model})

    def items(self) -> Any:  # the last thing that PEFT asks for
        self._config.show_base()
        return super().items()


def _is_of_others(adapters: set[str], own: set[str]) -> bool:
    return bool(adapters) and adapters.isdisjoint(own)  # one that has lost its last copy is nobody's


def _not_missing(model: nn.Module, prefix: str, adapter_name: str, given: Collection[str]) -> dict[str, Tensor]:
    """What PEFT would take for missing keys of an adapter: other parts whose names contain the adapter's.

    They are given back as they are: a frozen encoder's weights, those of other adapters, and all of a method's for an
    adapter that is called like a piece of its prefix.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    kept = model.state_dict().keys() - set(given)
    return {key: value for key, value in tensors.items() if key in kept and prefix in key and adapter_name in key}


def _resize(model: nn.Module, others: dict[str, Tensor]) -> str:
    """The way out where a file holds embeddings of another size than the model's."""
    with suppress(AttributeError, NotImplementedError):  # no model of transformers, or one without token embeddings
        rows, own = anatomy.base_model(model).get_input_embeddings().num_embeddings, model.state_dict()
        for key, value in others.items():
            mine = own[key].shape if key in own else ()
            if mine[:1] == (rows,) and value.shape[1:] == mine[1:] and len(value) != rows:
                return f" The base was resized then: model.resize_token_embeddings({len(value)}) before loading."
    return ""


def check_bare(model: nn.Module) -> None:
    """Refuse a model that something is wrapped around, which would go on running what was there before."""
    if (bare := anatomy.unwrapped(model)) is not model:
        kind, name = type(model).__name__, type(bare).__name__
        wrap = "torch.compile" if kind == "OptimizedModule" else kind
        raise ValueError(
            f"{name} is wrapped in {kind}. An adapter goes onto the model itself, and the wrapper around both: make or load the "
            f"adapter first, then {wrap}(model)."
        )


def tuner_of(config: Any) -> type:
    """The class of a config's model."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


def check_adapter_name(name: str) -> None:
    """Adapters' names are keys of torch's containers, parts of parameters' names, and names of folders."""
    taken = hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name)
    if taken or name in COMPANIONS or not re.fullmatch(r"[^\s./\\:\x00]+", name):
        why = "it holds a dot, slash, colon or space, or is empty"
        if taken:
            why = "torch's containers have an attribute of this name"
        elif name in COMPANIONS:
            why = "a folder of this name stands beside an adapter's files"
        raise ValueError(
            f"adapter_name={name!r} can't be used: {why}. Adapters are called by letters, digits, - and _, such as "
            f"{re.sub('[^A-Za-z0-9_-]+', '-', name).strip('-') + ('-1' if taken or name in COMPANIONS else '') or 'default'!r}."
        )


def card_notes(model: Any, adapter_name: str) -> CardNotes:
    """What a wrapped model knows for an adapter's model card."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, MultimodalTuner) or tuner_of(tuner.peft_config[adapter_name]) is not type(tuner):
        return CardNotes()
    return tuner.card_notes(adapter_name)


def matched_modules(model: nn.Module, config: MultimodalConfig) -> MatchTable:
    """What `get_peft_model(model, config)` would adapt: names, shapes, towers. The model is not changed.

    Raises:
        ValueError: nothing matches; the message names what exists.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner: Any = dict(PEFT_TYPE_TO_TUNER_MAPPING).get(config.peft_type) if isinstance(config, PeftConfig) else None  # type: ignore[call-overload]
    if tuner is None or not issubclass(tuner, MultimodalTuner):
        raise TypeError(f"matched_modules takes a config of this package, got {type(config).__name__}")
    return MatchTable(tuner.match(config, model))


def _short(key: str) -> str:
    return key.removeprefix(_PEFT_PREFIX)


def _some(keys: Collection[str]) -> str:
    names = sorted(_short(k) for k in keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
