"""How a method puts its parts into a model: one template for all methods."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import _ExcludedModule
from torch import nn

from .anatomy import Anatomy, Matrix, Site, base_model, describe, pixel_readers, token_embeddings
from .checks import check_adapter_name, check_bare, check_beside, check_reach, check_whole_modules, warn_of_unread
from .companions import own_copy, record_of
from .matching import check_same_base, choose, fold, left_out
from .parts import AttachedPart, InputGradients, MultimodalLayer
from .storage import check_below, check_file_has_modules, check_modules_to_save, is_hub_id
from .storing import StoringTuner


@dataclass
class Injection:
    """What is known while one adapter is put into a model; it ends with that."""

    adapter_name: str
    config: Any
    anatomy: Anatomy
    sites: list[Any]  # of the kind that the method's `sites` gives
    prepared: Any = None  # what the method's `prepare` gave
    modules: list[str] = field(default_factory=list)  # paths of the modules that have got their part

    def at(self, module: str) -> list[Any]:
        """All sites of one module, such as the three matrices of a fused projection."""
        return [site for site in self.sites if site.module == module]


class MultimodalTuner(StoringTuner):
    """Base of all methods' models: puts parts at sites, and takes them out again.

    A method says where (`sites`), what (`make`), and how an adapter joins what is there (`add`):

        @method("toy", ToyConfig, summary="...", docs="docs/toy.md", promises=Promises(acts_on="layers"))
        class ToyModel(MultimodalTuner):
            tuner_layer_cls = ToyLayer

            @classmethod
            def candidates(cls, config, model, anatomy):  # ToyConfig is a TargetedConfig; others override `sites`
                return ffns(model, anatomy)

            def make(self, injection, site, module):
                return ToyLayer(module, site.role)

            def add(self, injection, site, part):
                part.add(injection.adapter_name, site.d_in, injection.config.r)

    A part that is an `AttachedPart` hangs below the site's module, as its child `<prefix><site's kind>`; any other part
    takes the module's place. What parts share is a part as well, at a site of `stores`, which come first. Whether an
    adapter trains, train or eval mode, device and dtype, undoing and deleting are seen to here.
    """

    target_module_mapping: dict[str, list[str]] = {}
    places = "it has no weight matrices"
    """Why a model may have no place for this method; ends the sentence "Nothing in it can be adapted"."""
    learning_rates: tuple[float, float] | None = None
    """From where to where a method's learning rate is sane, for optimizers of Adam's kind."""
    not_beside: dict[str, str] = {}
    """{PEFT type of another method: why no model can have both, and what to do instead}."""
    wraps = False
    """Whether it puts layers around modules, which moves what is inside; not where its parts hang below modules."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_bare(model)
        outer, model = model, base_model(model)  # a model that has adapters of another method
        present = getattr(model, "peft_config", None) or {}
        if isinstance(peft_config, PeftConfig):  # a PeftModel passes {name: config}
            if not present:
                vars(model).pop("_hf_peft_config_loaded", None)  # transformers has set it before it asked
            shared = self.uses_shared_state
            kept = "shared state, which its layers read," if shared else "what it hangs beside frozen modules"
            raise ValueError(
                f"{type(peft_config).__name__} isn't injected into a bare model (inject_adapter_in_model, and add_adapter and "
                f"load_adapter of a transformers model): {kept} couldn't be loaded, deleted and taken out again there. Use "
                "get_peft_model(model, config), and peft_multimodal.load(model, folder) or PeftModel.from_pretrained; the PeftModel's own add_adapter and load_adapter add more."
            )
        check_below(outer, model)
        check_beside(type(self), present, peft_config[adapter_name], adapter_name)
        training = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            present.pop(adapter_name, None)  # it is shared with the model's other adapters, which stay as they are
            for parameter in training:
                parameter.requires_grad_(True)
            raise
        record = record_of(self.peft_config[adapter_name])
        record.trained_before = training if record.awaits_weights else ()

    # --- what a method says ------------------------------------------------------------------------------------------

    @classmethod
    def sites(cls, config: Any, model: nn.Module, anatomy: Anatomy) -> list[Site]:
        """Where the adapter goes, in the model's order: by default those of `candidates` that a `TargetedConfig` means.

        Raises:
            NoMatchingPeftModuleError: there is no such place; the message says what to do.
        """
        candidates = cls.candidates(config, model, anatomy)
        return choose(config, model, anatomy, candidates, cls.default_targets, cls.places)

    @classmethod
    def candidates(cls, config: Any, model: nn.Module, anatomy: Anatomy) -> list[Any]:
        """What `target_modules` chooses among: by default any matrix."""
        return anatomy.matrices

    @classmethod
    def default_targets(cls, config: Any, candidates: list[Any]) -> list[Any]:
        """What `target_modules=None` means."""
        return candidates

    @classmethod
    def linear_tensors(cls, config: Any) -> str | None:
        """Regular expression of the adapter's tensors (`container.name`) in which what it adds is linear; None: there are none.

        Multiplied by a, they make what the adapter adds a times as large, which is what `adapter_scale` does.
        """
        return None

    def check(self, config: Any, sites: list[Any], anatomy: Anatomy) -> None:
        """Refuse what this method can't do on this model. Nothing is changed or loaded yet, nor here."""

    def prepare(self, config: Any, sites: list[Any], anatomy: Anatomy) -> Any:
        """Load, measure and fill in the config's fields; what it returns is `injection.prepared`.

        All of an adapter's new parameters may be empty ones on the meta device (`low_cpu_mem_usage`); here they are real.
        """

    def signature(self, sites: list[Any], anatomy: Anatomy) -> dict[str, Any]:
        """What the adapter's file says of its base: checked when it is loaded."""
        towers = {site.tower for site in sites}
        sizes = {name: size for name, size in anatomy.signature().items() if name in towers}
        return {"model_class": anatomy.model_class, "towers": sizes, "roles": fold(sites)}

    def stores(self, injection: Injection) -> Iterable[Site]:
        """Sites of what the parts share or need beside them; path "" is the model itself. Made before the others."""
        return ()

    def make(self, injection: Injection, site: Any, module: Any) -> MultimodalLayer:
        """A part without adapters for a site that has none yet; `module` is what stands there."""
        raise NotImplementedError

    def add(self, injection: Injection, site: Any, part: Any) -> None:
        """Let the adapter join a part."""
        raise NotImplementedError

    # --- the template ------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name] = own_copy(self.peft_config[adapter_name])
        injection = self._injection = self._planned(adapter_name, config)
        targets, listed = config.target_modules, list(self.targeted_module_names)
        existed = any(layer.has_adapter(adapter_name) for layer in self.own_layers())
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            if not existed:
                self._take_back(adapter_name)
            raise
        finally:
            del self._injection
            if config.target_modules != targets:  # PEFT writes "all-linear" out into names, which a rename would break
                config.target_modules = targets
        self.targeted_module_names = list(dict.fromkeys(listed + injection.modules))
        for path in [*token_embeddings(model), *pixel_readers(model)]:
            reader = model.get_submodule(path)
            if not any(isinstance(hook, InputGradients) for hook in reader._forward_hooks.values()):
                reader.register_forward_hook(InputGradients(model))

    def _planned(self, adapter_name: str, config: Any) -> Injection:
        """Check everything, then load what the adapter brings along."""
        check_file_has_modules(self.model, config)
        anatomy = describe(self.model)
        if config.is_loaded:
            check_same_base(config, anatomy)
        check_modules_to_save(self.model, config)
        sites = self.sites(config, self.model, anatomy)
        check_reach(self, sites, self.wraps)
        check_whole_modules(self, config)
        self.check(config, sites, anatomy)
        injection = Injection(adapter_name, config, anatomy, sites, self.prepare(config, sites, anatomy))
        if not config.is_loaded:
            warn_of_unread(self.model, sites, anatomy)
        base = config.base_model_name_or_path or getattr(self.model, "name_or_path", None)
        record_of(config).local_base = None if is_hub_id(base) else base
        config.base_signature = self.signature(sites, anatomy)
        return injection

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        with suppress(NotImplementedError):  # a model without `get_input_embeddings` has nothing tied to it
            super()._check_tied_modules(model, peft_config)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        """PEFT asks for every module. At the first one all parts are made, also those below the model itself."""
        return _ExcludedModule() if left_out(peft_config, key) else not self._injection.modules

    def _create_and_replace(self, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        injection = self._injection
        first: dict[tuple[str, str], Site] = {}
        for site in injection.sites:
            if not left_out(peft_config, site.module):  # the matrices of a module have one part
                first.setdefault((site.module, "" if isinstance(site, Matrix) else site.kind), site)
        for site in [*self.stores(injection), *first.values()]:
            self._put(injection, site)

    def _put(self, injection: Injection, site: Site) -> None:
        """Add the adapter to the part at a site, which is made if there is none."""
        module = self.model.get_submodule(site.module)
        name = self.prefix + site.kind
        part: Any = module if isinstance(module, self.tuner_layer_cls) else module._modules.get(name)
        is_new = part is None
        if is_new:
            part = self.make(injection, site, module)
            if isinstance(part, AttachedPart):
                module.add_module(name, part)
            else:
                parent, _, child = site.module.rpartition(".")
                setattr(self.model.get_submodule(parent), child, part)
        self.add(injection, site, part)
        part.settle(injection.adapter_name)
        if is_new or isinstance(part, AttachedPart):
            part.train(module.training)  # no dropout in a model that stands in eval mode
        injection.modules.append(site.module)
