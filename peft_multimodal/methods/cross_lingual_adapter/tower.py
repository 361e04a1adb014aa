"""What hangs below the text tower: the languages' frozen encoders and adapters, and a call that goes through them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...core.anatomy import dtype_of
from ...core.parts import BASE, CallScope, MultimodalLayer, check_rows, rows_beside
from ...core.stand_in import StandIn
from ...encoders.frozen import HoldsEncoders, Place
from ...encoders.language import LanguageEncoder, vocabulary_size
from ...languages import MultilingualTower, Teaching
from ...text_limits import longest_text, reads_padding
from .rows import by_language
from .text_tower import finished, teaching

_LANGUAGES = (
    "A language is called as its adapter: PeftModel.from_pretrained(..., adapter_name=...) gives it a name, "
    "and LanguageProcessor(..., adapters={language: adapter}) is told another."
)


class CrossLingualAdapterLayer(MultimodalLayer):
    """Base of everything that this method puts into a model."""


class LanguageTower(HoldsEncoders, CrossLingualAdapterLayer, MultilingualTower):
    """Hangs below the text tower and takes its `forward` over: the adapters and the encoders that they share.

    A language is an adapter. With the adapters disabled, and for rows named `__base__`, the tower runs as it is.
    """

    adapter_layer_names = ("cross_lingual_adapter_language",)
    cross_lingual_adapter_language: Any  # {adapter: LanguageAdapter}

    def __init__(self, model: nn.Module, tower: nn.Module, level: str) -> None:
        super().__init__(tower, "text")
        self.tokenizers: dict[str, Any] = {}
        self.longest: dict[str, int | None] = {}
        self.reads_padding = reads_padding(tower)
        self.level = level
        self.scope = CallScope()  # `adapter_names` of a call
        self._model = (model,)
        self.stand_in = StandIn(tower, "forward", self.forward)
        self.hooks = [self.stand_in]
        self.features_of: StandIn | None = None
        if hasattr(type(model), "get_text_features"):
            self.features_of = StandIn(model, "get_text_features", self.get_text_features, takes=["adapter_names"])
            self.hooks.append(self.features_of)

    def add(self, adapter_name: str, adapter: nn.Module, language: LanguageEncoder, place: Place | None) -> None:
        """Add a language: its adapter, and the encoder that was read at `place` (None: given as a module)."""
        encoder, self.tokenizers[adapter_name] = language
        self.take_encoder(adapter_name, encoder, place)
        self.longest[adapter_name] = longest_text(encoder)
        self.cross_lingual_adapter_language[adapter_name] = adapter

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.tokenizers.pop(adapter_name, None)
        self.longest.pop(adapter_name, None)

    # --- for training ---

    def widths(self, adapter_name: str) -> tuple[int, int]:
        adapter = self.cross_lingual_adapter_language[adapter_name]
        return adapter.down.in_features, adapter.up.out_features

    def frozen_weights(self, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
        for key, value in self.host().state_dict().items():
            if "cross_lingual_adapter_tower." not in key:
                yield f"teacher.{key}", value
        for key, value in self.encoder(adapter_name).state_dict().items():
            if not key.startswith("pooler."):  # a random one that a library puts on the encoder isn't used
                yield f"student.{key}", value

    def is_untrained(self, adapter_name: str) -> bool:
        bias = self.cross_lingual_adapter_language[adapter_name].up.bias
        return not bias.is_meta and not bias.any()

    @torch.no_grad()
    def start_at(self, mean: Tensor, adapter_name: str) -> None:
        self.cross_lingual_adapter_language[adapter_name].up.bias.copy_(mean)

    @torch.no_grad()
    def teach(self, input_ids: Tensor, attention_mask: Tensor | None) -> Teaching:
        tower = self.host()
        training = tower.training
        try:
            return teaching(tower.eval(), self.stand_in.original, self.level, input_ids, attention_mask)
        finally:
            tower.train(training)

    @contextmanager
    def standing_in(self, states: Tensor) -> Iterator[None]:
        self.scope.open()
        self.scope.values["states"] = states
        try:
            yield
        finally:
            self.scope.close()

    # --- a text of one language ---

    @torch.no_grad()
    def encode(self, input_ids: Tensor, mask: Tensor, adapter_name: str) -> Tensor:
        """H (B, L, d_s) of the language's frozen encoder; ValueError where it can't read the tokens."""
        encoder = self.encoder(adapter_name)
        check_tokens(input_ids, adapter_name, vocabulary_size(encoder), self.longest[adapter_name])
        return encoder(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state

    def project(
        self, H: Tensor, mask: Tensor, adapter_name: str, tokens: bool | None = None
    ) -> tuple[Tensor | None, Tensor]:
        adapter = self.cross_lingual_adapter_language[adapter_name]
        tokens = self.level == "tokens" if tokens is None else tokens
        return adapter(self._cast_input_dtype(H, dtype_of(adapter)), mask, tokens=tokens)

    def adapted(
        self, input_ids: Tensor, attention_mask: Tensor | None, adapter_name: str
    ) -> BaseModelOutputWithPooling:
        """What the text tower gives, for a text of the adapter's language."""
        if attention_mask is not None:
            mask = attention_mask.bool()
        else:
            pad = getattr(self.encoder(adapter_name).config, "pad_token_id", None)
            mask = torch.ones_like(input_ids, dtype=torch.bool) if pad is None else input_ids != pad
        H = self.encode(input_ids, mask, adapter_name)
        Y, y = self.project(H, mask, adapter_name, tokens=True)
        assert Y is not None
        dtype = dtype_of(self.host())
        Y, y = Y.to(dtype), y.to(dtype)
        if self.level == "pooled":
            return BaseModelOutputWithPooling(last_hidden_state=Y, pooler_output=y, hidden_states=(Y,))
        return finished(self.host(), Y)

    def in_language(self, input_ids: Tensor, attention_mask: Tensor, name: str) -> Any:
        """`adapted`, or the tower as it is for the base model's rows."""
        if name != BASE:
            return self.adapted(input_ids, attention_mask, name)
        return self.stand_in.original(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True
        )

    # --- a call of the tower ---

    def forward(self, input_ids: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the tower's `forward`."""
        if "states" in self.scope.values:
            return finished(self.host(), self.scope.values["states"])
        names, active = self.scope.values.get("adapter_names"), self.live_adapters()
        if names is not None and len(names) != len(input_ids):
            raise ValueError(f"{len(names)} adapter_names for {len(input_ids)} rows.")
        languages = active if names is None else list(dict.fromkeys(names))
        if self.disable_adapters or languages in ([], [BASE]):
            if args:
                return self.stand_in.original(input_ids, attention_mask, *args, **kwargs)
            return self.stand_in.original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if input_ids is None:
            raise ValueError(
                "A language's encoder reads input_ids; pass them, or use the English tower: model.disable_adapter()."
            )
        if len(languages) == 1:
            out = self.adapted(input_ids, attention_mask, languages[0])
        elif names is None:
            raise ValueError(
                f"Adapters {active} are languages: one can be active, or name each row's: adapter_names=[...]."
            )
        else:
            limit = getattr(getattr(self.host(), "config", None), "max_position_embeddings", None)
            out = by_language(self.in_language, input_ids, attention_mask, names, limit, self.level)
        wanted = kwargs.get("return_dict")
        if wanted is None:
            wanted = getattr(getattr(self.host(), "config", None), "return_dict", True)
        return out if wanted else out.to_tuple()

    def get_text_features(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own `get_text_features`, with the language of each row where `adapter_names` is given."""
        assert self.features_of is not None
        with self.rows(adapter_names, [*args, *kwargs.values()]):
            return self.features_of.original(*args, **kwargs)

    @contextmanager
    def rows(self, adapter_names: Sequence[str] | None, inputs: Collection[Any] = ()) -> Iterator[None]:
        """Within it, row i of a batch, of which these are inputs, is of the language `adapter_names[i]`."""
        if adapter_names is None:
            yield
            return
        check_rows(adapter_names, self.cross_lingual_adapter_language, inputs, _LANGUAGES)
        named = set(adapter_names)
        if self.disable_adapters and named != {BASE}:
            raise ValueError(
                f"Texts of {sorted(named - {BASE})} came while the adapters are disabled (adapter_names=[...] names each row's "
                "language)."
            )
        acting = [BASE] if self.disable_adapters else self.live_adapters()
        if len(acting) == 1 and named == set(acting):
            yield  # as it would be without names
            return
        self.scope.open()
        self.scope.values["adapter_names"] = list(adapter_names)
        try:
            with rows_beside(self._model[0], adapter_names):
                yield
        finally:
            self.scope.close()


def check_tokens(input_ids: Tensor, adapter_name: str, size: int, limit: int | None) -> None:
    """Refuse tokens (B, L) outside an encoder's vocabulary, and more of them than it can read."""
    if not torch.compiler.is_compiling() and not input_ids.is_meta:
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"Token {high if high >= size else low} is outside the {size} tokens of adapter {adapter_name!r}'s encoder: "
                "the text was tokenised for another model. LanguageProcessor picks the tokenizer of a language."
            )
    if limit is not None and input_ids.shape[1] > limit:
        raise ValueError(
            f"{input_ids.shape[1]} tokens, but the encoder of adapter {adapter_name!r} reads {limit}: tokenise with "
            f"truncation=True, max_length={limit}."
        )
