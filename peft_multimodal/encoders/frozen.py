"""A frozen encoder that an adapter brings along: found by its id and commit, read safely, checked to be whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ..core.anatomy import device_of, dtype_of
from ..core.companions import record_of
from ..core.parts import AttachedPart


class Place(NamedTuple):
    """Where an encoder is: a folder, or a Hub id and its commit."""

    name: str
    revision: str | None = None

    @property
    def key(self) -> str:
        """The name under which adapters share it."""
        return "encoder_" + hashlib.sha256(json.dumps(tuple(self)).encode()).hexdigest()[:16]


def give_encoder(config: Any, encoder: Any, module: nn.Module, field: str) -> None:
    """Take a module for the encoder that a config names, which then names where the module says that it is from.

    The config itself stays a handful of values. Its record keeps the module, as `get_peft_model(model, config)` hands over
    nothing beside the config, and goes with that object: a copy, a pickle or a file of the config names the encoder alone.

    Args:
        encoder: What is kept: the module, or more than it.
        field: The config's field that names it.
    """
    record_of(config).encoder = encoder
    name = getattr(getattr(module, "config", None), "name_or_path", None)
    setattr(config, field, getattr(config, field) or name or None)


def given_encoder(config: Any) -> Any:
    """What was given in place of the encoder that a config names, or None."""
    return record_of(config).encoder


class HoldsEncoders(AttachedPart):
    """A part whose adapters bring frozen encoders along: each is there once, and goes with the last that shares it."""

    def __init__(self, host: nn.Module, role: str = "") -> None:
        super().__init__(host, role)
        self.encoders = nn.ModuleDict()
        self.encoder_of: dict[str, str] = {}  # {adapter: the name of its encoder in there}

    def encoder(self, adapter_name: str) -> Any:
        return self.encoders[self.encoder_of[adapter_name]]

    def take_encoder(self, adapter_name: str, encoder: nn.Module, place: Place | None) -> None:
        """Put an adapter's encoder among those of the model.

        Args:
            place: None for one that was given as a module: such are numbered as they come, for names must be alike in
                every process.
        """
        name = next((name for name, present in self.encoders.items() if present is encoder), None)
        if name is None:
            name = (
                place.key if place is not None else next(k for n in count() if (k := f"given_{n}") not in self.encoders)
            )
            self.encoders[name] = encoder
        self.encoder_of[adapter_name] = name

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.encoder_of.pop(adapter_name, None)
        for name in set(self.encoders) - set(self.encoder_of.values()):
            del self.encoders[name]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoders.eval()  # frozen: no dropout, ever
        return self


def is_given(key: str) -> bool:
    """Whether the encoder that is shared under this name was given as a module."""
    return key.startswith("given_")


def find_encoder(name: str, revision: str | None, kind: str, field: str) -> Place:
    """The place of an encoder, a Hub id's with the commit that is there now; messages call it by its kind and field."""
    if Path(name).is_dir():
        return Place(name, revision)
    try:
        file = cached_file(name, "config.json", revision=revision)
    except OSError as error:
        raise ValueError(f"The {kind} {name!r} can't be found: {error}. {_elsewhere(field)}") from error
    commit = re.search(r"snapshots/([0-9a-f]{40})/", Path(file or "").as_posix())
    return Place(name, commit.group(1) if commit else revision)


def read_encoder(place: Place, kind: str, field: str, prefer: Any = None) -> nn.Module:
    """The encoder as a module, with all its weights; `prefer` is an auto class to take where it knows the model."""
    name, revision = place
    try:
        with real_parameters(), _without_load_report():
            config_class = type(AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False))
            auto = prefer if prefer is not None and config_class in prefer._model_mapping else AutoModel
            module, found = auto.from_pretrained(
                name, revision=revision, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"The {kind} {name!r} can't be loaded: {error}. {_elsewhere(field)}") from error
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)  # nobody reads a pooler
    if missing:
        raise ValueError(
            f"The {kind} {name!r} lacks weights: {', '.join(missing[:3])} and {len(missing)} in all, which would be random. "
            "Save it again as a whole."
        )
    return module


def check_same_encoder(config: Any, actual: dict[str, Any], field: str, given: str) -> None:
    """Record in the config what is known of its encoder; on loading, refuse one that differs from what is recorded.

    Args:
        actual: {field of the config: its value now}; None is unknown.
        field: The config's field that names the encoder.
        given: The call that takes a module for it.
    """
    for name, value in actual.items():
        recorded = getattr(config, name)
        if config.is_loaded and None not in (recorded, value) and recorded != value:
            raise ValueError(
                f"The adapter was trained on another encoder: {getattr(config, field)!r} has {name} {value!r} now, then it "
                f"was {recorded!r}. Name the right one: config.{field}, config.{field}_revision, or config.{given}(module)."
            )
        setattr(config, name, recorded if value is None else value)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """What is missing is checked here, and an encoder's pooler, which nobody reads, is no reason to warn."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _elsewhere(field: str) -> str:
    return (
        "If it is elsewhere now, name the place: config = PeftConfig.from_pretrained(folder); "
        f"config.{field} = ...; then pass config=config."
    )


_REGISTER = (nn.Module.register_parameter, nn.Module.register_buffer)


@contextmanager
def real_parameters() -> Iterator[None]:
    """Within it new parameters are real, also where PEFT loads an adapter with `low_cpu_mem_usage=True`.

    `PeftModel` then makes the tuner inside `init_empty_weights`, which replaces `nn.Module.register_parameter` so that all
    new parameters of the process are empty. It calls nothing of the tuner's before, and the encoder's width is needed to
    make the adapter: so the encoder is read inside, with torch's own methods put back meanwhile.
    """
    empty = (nn.Module.register_parameter, nn.Module.register_buffer)
    nn.Module.register_parameter, nn.Module.register_buffer = _REGISTER  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = empty  # type: ignore[method-assign]


def follow(encoder: nn.Module, host: nn.Module, keep_dtype: bool) -> None:
    """Move the encoder to the device of a part of the model, and unless it was given as a module to its dtype."""
    if (device := device_of(host)).type != "meta":
        encoder.to(device=device, dtype=None if keep_dtype else dtype_of(host))
