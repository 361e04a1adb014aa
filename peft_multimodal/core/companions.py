"""What belongs to an adapter's config and is none of its values, and what stands in a folder beside the adapter's weights.

A config holds its fields alone: copies, pickles and files of it are whole, and two models that are made with it share
nothing. Two things still have to travel with a config object, as PEFT hands a tuner nothing else: the folder that it was
read from, and a module that was given for its encoder. They are kept here under the object's identity, for as long as it
lives.

`PeftModel.save_pretrained` asks the tuner for an adapter's tensors, writes them, and has the config save itself at last.
So a save is announced when the tensors are asked for, and the companion files follow when the config is written.
"""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peft import TaskType
from torch import nn

from .registry import method_of

# Heads that PEFT adds to modules_to_save by the task, whether a model has them or not.
TASK_HEADS = {
    TaskType.SEQ_CLS: {"classifier", "score"},
    TaskType.TOKEN_CLS: {"classifier", "score"},
    TaskType.QUESTION_ANS: {"qa_outputs"},
}


@dataclass
class CardNotes:
    """What a model card says that no file of the adapter does: for `save` and `push_to_hub`.

    Args:
        metrics: {name: value}, as they are to be printed.
        dataset: What the metrics were measured on: a Hub id or a name. With it they are also in the card's metadata.
        languages: ISO 639 codes of the texts that the adapted model reads.
        classes: Names that a classifier was trained to tell apart.
        license: The adapter's, as the Hub calls it ("apache-2.0").

    Examples:
        >>> notes = CardNotes(metrics={"mean recall": 22.4}, dataset="user/emoji", license="apache-2.0")
    """

    metrics: Mapping[str, float | str] = field(default_factory=dict)
    dataset: str | None = None
    languages: Sequence[str] = ()
    classes: Sequence[str] = ()
    license: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a config was read.

    Args:
        source: A folder or a Hub id.
        subfolder: Within it.
        hub: Keywords for other files of the same repository.
        modules_to_save: Of the file, whatever is written into the config afterwards.
    """

    source: str
    subfolder: str | None
    hub: dict[str, Any]
    modules_to_save: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.source, self.subfolder or "")


@dataclass
class Record:
    """What is known of a config object beside its values.

    Args:
        origin: Where it was read.
        encoder: What was given for the encoder that it names.
        is_an_adapters: It is the config of an adapter in a model.
        awaits_weights: That adapter was made for a file, whose weights haven't come yet.
        trained_before: What trained in the model before it was wrapped for that adapter, until its weights have come.
        local_base: The base, if it was in a folder as seen where the model was wrapped.
        best_is_loaded: Somebody cares for `load_best_model_at_end`.
        save: The model and the adapter's name of a save that has been announced.
    """

    origin: Origin | None = None
    encoder: Any = None
    is_an_adapters: bool = False
    awaits_weights: bool = False
    trained_before: Sequence[nn.Parameter] = ()
    local_base: str | None = None
    best_is_loaded: bool = False
    save: tuple[weakref.ref[nn.Module], str] | None = None


_records: dict[int, Record] = globals().get("_records", {})  # a reloaded module keeps them


def record_of(config: Any) -> Record:
    """The record of this very object; a copy has one of its own."""
    if id(config) not in _records:
        _records[id(config)] = Record()
        weakref.finalize(config, _records.pop, id(config), None)
    return _records[id(config)]


def own_copy(config: Any) -> Any:
    """The config of one adapter: what is filled in as the adapter is made stays off the object that the user has."""
    record = record_of(config)
    copied = copy.deepcopy(config)
    # Of some tasks PEFT adds these after the adapter is made, to the object that it was handed.
    if heads := TASK_HEADS.get(config.task_type, set()) - set(config.modules_to_save or ()):
        copied.modules_to_save = [*(config.modules_to_save or ()), *sorted(heads)]
    new = record_of(copied)
    new.origin, new.encoder, new.is_an_adapters = record.origin, record.encoder, True
    new.awaits_weights = config.is_loaded and not record.is_an_adapters
    return copied


# --- the files beside an adapter's weights ---------------------------------------------------------------------------


class CardWriter(Protocol):
    """Writes or renews a folder's model card from its files and from what a model knows of its adapters."""

    def __call__(self, model: Any, folder: Path, name: str, notes: CardNotes | None = None) -> None: ...


_card_writer: CardWriter | None = globals().get("_card_writer")


def writes_cards(writer: CardWriter) -> CardWriter:
    """Decorate the function that writes model cards, which this floor of the package doesn't know."""
    global _card_writer
    _card_writer = writer
    return writer


def renew_card(model: Any, folder: Path, name: str) -> None:
    if _card_writer is not None:
        _card_writer(model, folder, name)


def announce_save(model: nn.Module, config: Any, adapter_name: str) -> None:
    """The next time that the config is saved, the companion files of this model's adapter go with it."""
    record_of(config).save = (weakref.ref(model), adapter_name)


@contextmanager
def companions(config: Any, folder: Path) -> Iterator[None]:
    """Within it the config's file is written: after the method's own companion files, and before the card."""
    announced, record_of(config).save = record_of(config).save, None
    model = announced and announced[0]()
    if announced is None or model is None:
        yield
        return
    name, method = announced[1], method_of(config)
    if method is not None:
        method.model.save_companions(model, config, name, folder)
    yield
    _warn_of_checkpoint(config, folder)
    root = folder if name == "default" else folder.parent
    renew_card(model, root, root.name)


def _warn_of_checkpoint(config: Any, folder: Path) -> None:
    """Once: the stock Trainer looks for its best model in a checkpoint's root, where "default" is."""
    if re.fullmatch(r"checkpoint-\d+", folder.parent.name) and not record_of(config).best_is_loaded:
        record_of(config).best_is_loaded = True
        warnings.warn(
            f"The adapter {folder.name!r} is saved in {folder}, where Trainer(load_best_model_at_end=True) doesn't look: "
            'it knows one adapter, called "default", and would keep the last weights. Give it '
            "callbacks=[peft_multimodal.AdapterCallback()], which loads the best of every adapter.",
            stacklevel=6,
        )
