"""The part that StructuredPrompt hangs into a dual encoder: images in, logits of a class list out.

It holds the adapters and the class list, checks what a call brings, and wraps what is kept from call to call around the
pipeline of `pipeline.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ...core.modes import eval_mode
from ...core.parts import AttachedPart, MultimodalLayer, is_checkpointing
from ...core.readers import pixel_readers
from ...core.stand_in import StandIn
from .context import StructuredContext
from .dual_encoder import Images, base_alone, pair_loss, patches, scaled
from .inputs import Settings, check_labels, class_list, fitting
from .keeper import Keeper
from .pieces import Texts, join
from .pipeline import Prompts
from .reader import PromptReader


@dataclass
class StructuredPromptOutput(ModelOutput):
    """What the model gives while an adapter is active.

    Args:
        loss: Where `labels` or `return_loss=True` were given.
        logits: (B, C) over the class list.
        logits_per_image: (B, N) over the captions of the call, where `input_ids` were given.
        logits_per_text: Its transpose.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None


class StructuredPromptLayer(MultimodalLayer):
    """Base of what this method puts into a model."""


class PromptedClassifier(AttachedPart, StructuredPromptLayer):
    """Hangs below the text tower and takes the model's `forward` over: images in, class logits out.

    With the adapters disabled the model is as it was. The class list belongs to the model, not to an adapter, and is
    never saved.
    """

    adapter_layer_names = ("structured_prompt_context",)
    structured_prompt_context: Any  # {adapter: StructuredContext}

    def __init__(self, model: Any, tower: nn.Module, embedding: nn.Embedding) -> None:
        super().__init__(tower, "text")
        self.settings: dict[str, Settings] = {}
        self.unread: set[str] = set()  # adapters whose words wait for a tokenizer
        self.reader = PromptReader(model, tower, embedding)
        self.keeper = Keeper(model, embedding)
        self.tokenizer: Any = None
        self.texts: Texts | None = None
        self._model = (model,)  # a tuple is not registered
        self._convolutions = tuple(model.get_submodule(path) for path in pixel_readers(model))
        self._image_inputs = frozenset(inspect.signature(model.get_image_features).parameters)
        self.stand_in = StandIn(model, "forward", self.forward, signature=inspect.signature(self.forward))
        self.hooks = [embedding.register_forward_hook(self.reader.replace), self.reader.attention, self.stand_in]
        # Trainer would pass on the count of labels to a forward with **kwargs; the loss is a mean over its own batch.
        self._accepted = {name: value for name, value in vars(model).items() if name == "accepts_loss_kwargs"}
        model.accepts_loss_kwargs = False

    def remove_hooks(self) -> None:
        super().remove_hooks()
        del self._model[0].accepts_loss_kwargs
        vars(self._model[0]).update(self._accepted)

    def add(self, adapter_name: str, settings: Settings, context: StructuredContext) -> None:
        self.settings[adapter_name] = settings
        self.structured_prompt_context[adapter_name] = context
        if settings.general_init is not None:
            self.unread.add(adapter_name)
            self.read_words()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.settings.pop(adapter_name, None)
        self.unread.discard(adapter_name)
        self.keeper.forget(adapter_name)

    # --- words and classes ---

    def set_tokenizer(self, tokenizer: Any) -> None:
        self.reader.measure(tokenizer)
        self.tokenizer = tokenizer
        self.read_words()

    @torch.no_grad()
    def read_words(self) -> None:
        """Let the general contexts of new adapters start from their words, once there is a tokenizer to read them."""
        for adapter_name in sorted(self.unread) if self.tokenizer is not None else ():
            settings, general = self.settings[adapter_name], self.structured_prompt_context[adapter_name].general
            words = settings.general_init
            if general is not None and not general.is_meta:
                ids = self.reader.tokenizer_frame().words(self.tokenizer, [words or ""])[0]
                if words == type(settings).general_init:
                    ids = ids[-len(general) :]  # nobody chose these words for this length
                if len(ids) > len(general):
                    raise ValueError(
                        f"general_init={words!r} is {len(ids)} tokens, but num_general is {len(general)}: use fewer words, "
                        "more tokens, or None."
                    )
                general[len(general) - len(ids) :] = self.reader.tokens(ids).embeds[0].to(general)
            self.unread.discard(adapter_name)

    def set_classes(self, names: Sequence[str]) -> None:
        """The checks of [`StructuredPromptModel.set_classes`], then the list."""
        texts = class_list(names, self.tokenizer, self.reader)
        for adapter_name in self.active_adapters:
            if adapter_name in self.settings:
                fitting(texts, adapter_name, self.settings[adapter_name], self.reader)
        self.texts = texts
        self.keeper.kept.clear()

    def listed(self, adapter_name: str | None = None) -> Texts:
        """The class list, as an adapter takes it; ValueError where there is none, or the adapter can't take it."""
        if self.texts is None:
            self.reader.tokenizer_frame()
            raise ValueError(
                "No classes are set: call model.set_classes(names, tokenizer), or pass captions: input_ids."
            )
        if adapter_name is None:
            return self.texts
        return fitting(self.texts, adapter_name, self.settings[adapter_name], self.reader)

    # --- features of images, of the base model, of prompts ---

    def look(self, pixel_values: Tensor | None, **image_inputs: Any) -> Images:
        """What the vision tower says; no gradient goes through the patches."""
        if pixel_values is None:
            raise ValueError("The batch has no pixel_values: the classifier needs images.")
        if not torch.compiler.is_compiling() and not len(pixel_values):
            raise ValueError("The batch is empty: pixel_values holds no image.")
        model = self._model[0]
        with eval_mode(model):  # no dropout, no checkpoints: what is frozen gives the same at each call
            out = model.get_image_features(pixel_values=pixel_values, return_dict=True, **image_inputs)
        Z = patches(self._convolutions, pixel_values, out.last_hidden_state.detach())
        return Images(F.normalize(out.pooler_output, dim=-1), Z, image_inputs.get("pixel_attention_mask"))

    @torch.no_grad()
    def hand_written(self, texts: Texts, chunk_size: int) -> Tensor:
        """(C, e): the base model's features of the words as they stand."""
        with base_alone(self._model[0]):
            pieces = (self.reader.tokens(some.ids, some.mask) for some in texts.chunks(chunk_size))
            return torch.cat([self.reader.features(join(self.reader.lead(), p, self.reader.tail())) for p in pieces])

    def templated(self, template: str, chunk_size: int) -> Tensor:
        """(C, e): the base model's features of the class list in a template, "a photo of a {}"."""
        texts, frame, room = self.listed(), self.reader.tokenizer_frame(), self.reader.room()
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"template must be words with {{}} for the name, got {template!r}.")

        def features() -> Tensor:
            filled = [template.replace("{}", name) for name in texts.names or ()]
            words = frame.words(self.tokenizer, filled)
            for text, ids in zip(filled, words, strict=True):
                if len(ids) > room:
                    raise ValueError(f"{text!r} is {len(ids)} tokens; the text tower has room for {room}. Shorten it.")
            return self.hand_written(Texts.of_lists(words, frame.pad, texts.ids.device), chunk_size)

        return self.keeper(None, template, features)

    def prompts(self, adapter_name: str) -> Prompts:
        """The pipeline of an adapter's prompts."""
        settings = self.settings[adapter_name]
        return Prompts(self.reader, self.structured_prompt_context[adapter_name], settings.order, settings.chunk_size)

    def static(self, adapter_name: str) -> Tensor:
        """(C, e): features of static prompts of the class list, kept from call to call."""
        prompts, texts = self.prompts(adapter_name), self.listed(adapter_name)
        return self.keeper(adapter_name, "static", lambda: prompts.static(texts), prompts.context)

    def known(self, adapter_name: str) -> Any:
        """What the class list alone tells, kept from call to call; None where it tells nothing, and in training."""
        prompts = self.prompts(adapter_name)
        if not prompts.knows_lists or not self.keeper.keeps(adapter_name):
            return None
        texts = self.listed(adapter_name)
        return self.keeper(adapter_name, "list", lambda: prompts.of_list(texts), prompts.context)

    # --- a call of the model ---

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *args: Any,
        labels: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Stands in for the model's `forward`: [`StructuredPromptModel`] says what it takes and gives."""
        model, active = self._model[0], self.live_adapters()
        if model.training and self.keeper.trains() and not torch.compiler.is_compiling():
            self.keeper.forget(*self.settings)  # it ends with the step
        if not active:
            return self._base(input_ids, pixel_values, *args, labels=labels, return_loss=return_loss, return_dict=return_dict, **kwargs)  # fmt: skip
        if len(active) > 1:
            raise ValueError(f"Adapters {active} are classifiers of their own: one can be active.")
        if args:
            raise ValueError("Inputs are passed by name.")
        adapter_name, settings = active[0], self.settings[active[0]]
        mask = {name: kwargs.pop(name, None) for name in ("attention_mask", "token_type_ids")}["attention_mask"]
        if input_ids is None:
            texts = self.listed(adapter_name)
            if return_loss:
                raise ValueError("return_loss=True is for captions (input_ids); with a class list pass labels.")
        else:
            texts = Texts.of_batch(input_ids, mask, self.reader.tokenizer_frame())
            texts = fitting(texts, adapter_name, settings, self.reader)
            if labels is not None:
                raise ValueError(
                    "labels are places in the class list; with captions (input_ids) pass return_loss=True."
                )
        classes = texts.ids.shape[0]
        if labels is not None:
            check_labels(labels, pixel_values, classes)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PeftModel names what it got no
        if unread := kwargs.keys() - self._image_inputs:
            raise TypeError(f"Nothing reads {sorted(unread)} while an adapter of this method is active.")
        images, anchors = self.look(pixel_values, **kwargs), None
        if settings.text_anchor and (labels is not None or return_loss):
            size = settings.chunk_size
            anchors = self.templated(settings.anchor_template, size) if input_ids is None else self.hand_written(texts, size)  # fmt: skip
        prompts, known = self.prompts(adapter_name), self.known(adapter_name) if input_ids is None else None
        if settings.shortlist is not None and not model.training:
            static = self.static(adapter_name) if input_ids is None else prompts.static(texts)
            cos, near = prompts.shortlisted(images, texts, settings.shortlist, static, known), None
        else:
            recompute = self.keeper.trains() and (classes > settings.chunk_size or is_checkpointing(model))
            cos, near = prompts.cosines(images, texts, known, anchors, recompute)
        logits, loss = scaled(model, cos), None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels.long())
        elif return_loss:
            loss = pair_loss(model, logits)
        if near is not None and loss is not None:
            loss = loss + settings.text_anchor * (1 - near).mean()
        if input_ids is None:
            out = StructuredPromptOutput(loss=loss, logits=logits)
        else:
            out = StructuredPromptOutput(loss=loss, logits_per_image=logits, logits_per_text=logits.T)
        return out if return_dict is not False else out.to_tuple()

    def _base(self, *args: Any, labels: Tensor | None, **kwargs: Any) -> Any:
        """The model as it is."""
        if labels is not None:
            raise ValueError(
                "labels were given while no adapter is active; model.zero_shot_logits gives the base's logits."
            )
        given = {name: value for name, value in kwargs.items() if value is not None}
        if len(args) > 2:
            return self.stand_in.original(*args, **given)
        named = zip(("input_ids", "pixel_values"), args, strict=True)
        return self.stand_in.original(**{name: value for name, value in named if value is not None}, **given)
