"""CrossLingualAdapter: a frozen encoder of another language and a small adapter stand in for the English text tower.

Vision and language are decoupled in a dual encoder, so a language is added with translation pairs alone: a frozen
encoder S of that language and the adapter A are trained to give what the frozen English tower T gives for the
translation. Nothing else changes: pictures that were indexed before stay valid to the last bit.

    H   = S(tokens of the language)                         B x L x d_s, frozen
    A_0 = LN(H) W_down + b_down                             d_s -> m
    A_k = TransformerBlock(A_{k-1}), k = 1..n               bidirectional, padding masked
    Y   = A_n W_up + b_up                                   m -> d_t: in place of the tower's token states
    y   = pool(Y)                                           in place of its pooled output, before any projection

With n = 0 this is the linear head of Multilingual-CLIP (Carlsson et al. 2022); the frozen student with a down
projection, one or two transformer layers and an up projection is the recipe of DAMO's talk on adapting CLIP to
Chinese. The losses stand in `peft_multimodal.training.distillation`.

Parameters, at an FFN of 4 m: (d_s m + m) + n (12 m^2 + 13 m) + (m d_t + d_t); pooling by attention has m more.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import NoMatchingPeftModuleError
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...core.anatomy import (
    Anatomy,
    Site,
    base_model,
    describe,
    device_of,
    dtype_of,
    is_below,
    own_modules,
    token_embeddings,
)
from ...core.config import MultimodalConfig, heads_for
from ...core.parts import BASE, AttachedPart, CallScope, MultimodalLayer, check_rows, rows_beside
from ...core.registry import Promises, method
from ...core.stand_in import StandIn
from ...core.tuner import MultimodalTuner
from ...encoders.frozen import follow, share
from ...encoders.language import (
    KEPT,
    KEPT_TOKENIZER,
    LanguageEncoder,
    load_encoder,
    place_of,
    vocabulary_size,
)
from ...model_card import CardNotes
from ...nn.transformer_block import TransformerBlock
from ...text_limits import longest_text, reads_padding


@dataclass
class CrossLingualAdapterConfig(MultimodalConfig):
    """Configuration of [`CrossLingualAdapterModel`].

    Args:
        encoder: The frozen encoder of the language: a Hub id or a folder for `AutoModel`. Several languages that name
            the same encoder share it. `with_encoder` takes a module instead.
        encoder_revision: Its commit, tag or branch; filled in with the commit that was loaded.
        bottleneck_dim: Width m of the adapter.
        num_layers: Transformer layers n; 0 leaves a linear map.
        num_heads: Their attention heads; None takes 4, or fewer where 4 doesn't divide the width.
        ff_mult: Their FFN's width in multiples of m.
        dropout: On what the adapter reads and in its transformer layers, in training.
        pool: How y is taken from Y: "mean" over the text's tokens, "cls" (the first token) or "attention" (a learned query).
        level: "pooled" for dual encoders; "tokens" where a fusion encoder reads the text's token states (FLAVA). None
            takes what the model asks for; a text tower alone doesn't tell, so there None is "pooled".
        save_encoder: Keep a copy of the encoder in the adapter's folder, for one that is on no Hub.
        encoder_type, encoder_width, encoder_vocab_size, tokenizer_hash, output_dim: Filled in; checked on loading.
    """

    encoder: str | None = None
    encoder_revision: str | None = None
    bottleneck_dim: int = 256
    num_layers: int = 1
    num_heads: int | None = None
    ff_mult: int = 4
    dropout: float = 0.0
    pool: str = "mean"
    level: str | None = None
    save_encoder: bool = False
    encoder_type: str | None = None
    encoder_width: int | None = None
    encoder_vocab_size: int | None = None
    tokenizer_hash: str | None = None
    output_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("CROSS_LINGUAL_ADAPTER")
        for name in ("bottleneck_dim", "ff_mult"):
            self.check_number(name, 1, integer=True)
        if self.num_heads is None:
            self.num_heads = heads_for(self.bottleneck_dim)
        self.check_number("num_heads", 1, integer=True)
        self.check_number("num_layers", 0, 1000, integer=True)
        self.check_number("dropout", 0, 0.999)
        self.check_choice("pool", ("mean", "cls", "attention"))
        self.check("level", "'pooled', 'tokens' or None", lambda v: v in (None, "pooled", "tokens"))
        self.check_flag("save_encoder")
        for name in ("encoder", "encoder_revision", "encoder_type", "tokenizer_hash"):
            self.check(name, "a string or None", lambda v: v is None or (isinstance(v, str) and v))
        for name in ("encoder_width", "encoder_vocab_size", "output_dim"):
            self.check(name, "a positive integer or None", lambda v: v is None or (type(v) is int and v > 0))
        self.check("num_heads", "a divisor of bottleneck_dim", lambda v: self.bottleneck_dim % v == 0)
        whole = "None: the text tower is replaced as a whole"
        for name in ("target_modules", "exclude_modules", "layers_to_transform"):
            self.check(name, whole, lambda v: v is None)
        self.check("towers", "None or ['text']", lambda v: v is None or list(v) == ["text"])
        self._given: LanguageEncoder | None = None  # neither this nor the next is saved
        self._folder: dict[str, Any] | None = None
        self._loaded: LanguageEncoder | None = None
        self._measured_level: str | None = None

    def with_encoder(self, encoder: nn.Module, tokenizer: Any = None) -> CrossLingualAdapterConfig:
        """Take this module (and its tokenizer) for the encoder; returns the config.

        The config records `encoder`, or where the module says that it came from. An encoder that was trained or
        changed here should be published, or kept with the adapter by `save_encoder=True`.
        """
        self._given = LanguageEncoder(encoder, tokenizer)
        name = getattr(getattr(encoder, "config", None), "name_or_path", None)
        self.encoder = self.encoder or name or None
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if kwargs.get(name) is not None}
        config._folder = {"source": str(pretrained_model_name_or_path), "subfolder": subfolder, "hub": hub}
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Also keeps the tokenizer's files, and the encoder with `save_encoder=True`; the config is written last."""
        if self._loaded is not None:
            if self._loaded.tokenizer is not None:
                self._loaded.tokenizer.save_pretrained(Path(save_directory, KEPT_TOKENIZER))
            if self.save_encoder:
                self._loaded.module.save_pretrained(Path(save_directory, KEPT))  # type: ignore[operator]
            elif self.encoder is None or Path(self.encoder).is_dir() or self._given is not None:
                warnings.warn(
                    f"The adapter's folder names its language encoder by {self.encoder!r}, which is no commit on the "
                    "Hub; elsewhere it loads only with that encoder at hand. Set "
                    "model.peft_config[adapter_name].save_encoder = True to keep a copy in the folder, or publish the "
                    "encoder and name its id.",
                    stacklevel=2,
                )
        super().save_pretrained(save_directory, **kwargs)


# --- the adapter -----------------------------------------------------------------------------------------------------


class LanguageAdapter(nn.Module):
    """The module docstring's A: from the states of the language's encoder to those of the text tower.

    Args:
        config: The adapter's.
        width: d_s of the encoder.
        output_dim: d_t of the tower.
    """

    def __init__(self, config: CrossLingualAdapterConfig, width: int, output_dim: int) -> None:
        super().__init__()
        m = config.bottleneck_dim
        heads: Any = config.num_heads
        self.pool = config.pool
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(width, m)
        self.blocks = nn.ModuleList(
            TransformerBlock(m, heads, config.ff_mult, config.dropout) for _ in range(config.num_layers)
        )
        self.up = nn.Linear(m, output_dim)
        nn.init.zeros_(self.up.bias)
        if config.pool == "attention":
            self.query = nn.Parameter(torch.zeros(m))  # a mean at the start

    def forward(self, H: Tensor, mask: Tensor, tokens: bool = True) -> tuple[Tensor | None, Tensor]:
        """(B, L, d_s) and a boolean mask (B, L) -> Y (B, L, d_t), or None unless `tokens`, and y (B, d_t)."""
        mask = mask | ~mask.any(dim=1, keepdim=True)  # a row of padding alone would be NaN
        A = self.down(self.dropout(self.norm(H)))
        for block in self.blocks:
            A = block(A, mask[:, None, None, :])
        y = self.up(self._pooled(A, mask))  # pooled before the map up: it is affine and the weights sum to 1
        if not tokens:
            return None, y
        # Who reads token states reads y as the first; where padding is on the left, it stands in both places.
        places = torch.arange(A.shape[1], device=A.device)
        first = (places == 0) | (places == mask.int().argmax(dim=1, keepdim=True))
        return torch.where(first[..., None], y[:, None], self.up(A)), y

    def _pooled(self, A: Tensor, mask: Tensor) -> Tensor:
        if self.pool == "cls":
            first = mask.int().argmax(dim=1)  # where padding is on the left
            return A[torch.arange(len(A), device=A.device), first]
        if self.pool == "attention":
            weights = (A @ self.query).masked_fill(~mask, float("-inf")).softmax(dim=1).to(A.dtype)
        else:
            weights = mask / mask.sum(dim=1, keepdim=True)
        return torch.einsum("bl,blm->bm", weights.to(A.dtype), A)


class Teaching(NamedTuple):
    """What the frozen tower gives for English texts: the pooled output (B, d_t), at the level of tokens E (B, L, d_t)."""

    pooled: Tensor
    states: Tensor | None


_LANGUAGES = (
    "A language is called as its adapter: PeftModel.from_pretrained(..., adapter_name=...) gives it a name, "
    "and LanguageProcessor(..., adapters={language: adapter}) is told another."
)


class CrossLingualAdapterLayer(MultimodalLayer):
    """Base of everything that this method puts into a model."""


class LanguageTower(nn.Module, AttachedPart, CrossLingualAdapterLayer):
    """Hangs below the text tower and takes its `forward` over: the adapters and the encoders that they share.

    A language is an adapter. With the adapters disabled, and for rows named `__base__`, the tower runs as it is.
    """

    role = "text"
    adapter_layer_names = ("cross_lingual_adapter_language",)
    cross_lingual_adapter_language: Any  # {adapter: LanguageAdapter}

    def __init__(self, model: nn.Module, tower: nn.Module, level: str) -> None:
        nn.Module.__init__(self)
        AttachedPart.__init__(self)
        self.cross_lingual_adapter_language = nn.ModuleDict()
        self.encoders = nn.ModuleDict()
        self.encoder_of: dict[str, str] = {}
        self.longest: dict[str, int | None] = {}  # tokens that each language's encoder reads
        self.reads_padding = reads_padding(tower)  # the tower itself
        self.level = level
        self.scope = CallScope()  # `adapter_names` of a call
        self._model, self._tower = (model,), (tower,)  # tuples are not registered
        self.stand_in = StandIn(tower, "forward", self.forward)
        self.features_of: StandIn | None = None
        if hasattr(type(model), "get_text_features"):
            self.features_of = StandIn(model, "get_text_features", self.get_text_features, takes=["adapter_names"])

    def host(self) -> nn.Module:
        return self._tower[0]

    def remove_hooks(self) -> None:
        super().remove_hooks()
        self.stand_in.give_back()
        if self.features_of is not None:
            self.features_of.give_back()

    def add(self, adapter_name: str, config: CrossLingualAdapterConfig, encoder: nn.Module) -> None:
        self.encoder_of[adapter_name] = share(self.encoders, encoder, place_of(config))
        self.longest[adapter_name] = longest_text(encoder)
        sizes: Any = (config.encoder_width, config.output_dim)
        self.cross_lingual_adapter_language[adapter_name] = LanguageAdapter(config, *sizes)
        self.settle(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.encoder_of.pop(adapter_name, None)
        self.longest.pop(adapter_name, None)
        for key in set(self.encoders) - set(self.encoder_of.values()):
            del self.encoders[key]

    def train(self, mode: bool = True) -> LanguageTower:
        super().train(mode)
        self.encoders.eval()  # frozen: no dropout, ever
        return self

    # --- the student ---

    @torch.no_grad()
    def encode(self, input_ids: Tensor, mask: Tensor, adapter_name: str) -> Tensor:
        """H (B, L, d_s) of the frozen encoder.

        Raises:
            ValueError: a token is outside its vocabulary, or a text is longer than it can read.
        """
        encoder: Any = self.encoders[self.encoder_of[adapter_name]]
        size, limit = vocabulary_size(encoder), self.longest[adapter_name]
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
        return encoder(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state

    def mask_of(self, input_ids: Tensor, attention_mask: Tensor | None, adapter_name: str) -> Tensor:
        """The boolean mask of the text's own tokens; without an attention mask by the encoder's padding id."""
        if attention_mask is not None:
            return attention_mask.bool()
        encoder: Any = self.encoders[self.encoder_of[adapter_name]]
        pad = getattr(encoder.config, "pad_token_id", None)
        return torch.ones_like(input_ids, dtype=torch.bool) if pad is None else input_ids != pad

    def project(
        self, H: Tensor, mask: Tensor, adapter_name: str, tokens: bool | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """The adapter alone: Y (B, L, d_t), or None unless `tokens`, and y (B, d_t). By default the level decides."""
        adapter = self.cross_lingual_adapter_language[adapter_name]
        tokens = self.level == "tokens" if tokens is None else tokens
        return adapter(self._cast_input_dtype(H, dtype_of(adapter)), mask, tokens=tokens)

    def adapted(
        self, input_ids: Tensor, attention_mask: Tensor | None, adapter_name: str
    ) -> BaseModelOutputWithPooling:
        """What the text tower gives, for a text of the adapter's language."""
        mask = self.mask_of(input_ids, attention_mask, adapter_name)
        H = self.encode(input_ids, mask, adapter_name)
        Y, y = self.project(H, mask, adapter_name, tokens=True)
        assert Y is not None
        dtype = dtype_of(self.host())
        Y, y = Y.to(dtype), y.to(dtype)
        if self.level == "pooled":
            return BaseModelOutputWithPooling(last_hidden_state=Y, pooler_output=y, hidden_states=(Y,))
        return self.finished(Y)

    def finished(self, states: Tensor) -> BaseModelOutputWithPooling:
        """The tower's output of its last layer's states (B, L, d_t): what stands behind the layers is its own."""
        tower: Any = self.host()
        norm, pooler = _final_norm(tower), getattr(tower, "pooler", None)
        last = states if norm is None else norm(states)
        pooled = last[:, 0] if pooler is None else pooler(last)
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=(states,))

    @contextmanager
    def standing_in(self, states: Tensor) -> Iterator[None]:
        """Within it the tower gives these states of its last layer (B, L, d_t), whatever text it is called with."""
        self.scope.open()
        self.scope.values["states"] = states
        try:
            yield
        finally:
            self.scope.close()

    # --- the teacher ---

    @torch.no_grad()
    def teach(self, input_ids: Tensor, attention_mask: Tensor | None) -> Teaching:
        """The frozen tower's outputs for English texts, in eval mode."""
        tower = self.host()
        training = tower.training
        try:
            return _teaching(tower.eval(), self.stand_in.original, self.level, input_ids, attention_mask)
        finally:
            tower.train(training)

    # --- a call of the tower ---

    def forward(self, input_ids: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the tower's `forward`."""
        if "states" in self.scope.values:
            return self.finished(self.scope.values["states"])
        names = self.scope.values.get("adapter_names")
        active = self.live_adapters()
        if names is not None and len(names) != len(input_ids):
            raise ValueError(f"{len(names)} adapter_names for {len(input_ids)} rows.")
        only_own = names is not None and set(names) == {BASE}
        if self.disable_adapters or only_own or (names is None and not active):
            if args:
                return self.stand_in.original(input_ids, attention_mask, *args, **kwargs)
            return self.stand_in.original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if input_ids is None:
            raise ValueError(
                "A language's encoder reads input_ids; pass them, or use the English tower: model.disable_adapter()."
            )
        if names is None:
            if len(active) > 1:
                raise ValueError(
                    f"Adapters {active} are languages: one can be active, or name each row's: adapter_names=[...]."
                )
            out = self.adapted(input_ids, attention_mask, active[0])
        elif len(set(names)) == 1:
            out = self.adapted(input_ids, attention_mask, names[0])
        else:
            out = self._by_rows(input_ids, attention_mask, names)
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

    def _extent(self, mask: Tensor, name: str) -> tuple[int, int]:
        """The columns that the texts of one language take, behind which stands other languages' padding."""
        limit = getattr(getattr(self.host(), "config", None), "max_position_embeddings", None)
        if name == BASE and (limit is None or mask.shape[1] <= limit):
            return 0, mask.shape[1]  # a tower may read its padding: SigLIP pools the last position
        columns = mask.any(dim=0).nonzero().flatten().tolist() or [0]
        return columns[0], columns[-1] + 1

    def _by_rows(self, input_ids: Tensor, attention_mask: Tensor | None, names: Any) -> BaseModelOutputWithPooling:
        """Each row by its own language; a row's result is that of a batch of its language alone."""
        if attention_mask is None:
            raise ValueError("A batch of several languages needs its attention_mask: each language pads its own way.")
        found: list[tuple[Tensor, int, int, Any]] = []
        for name in dict.fromkeys(names):
            rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=input_ids.device)
            start, end = self._extent(attention_mask[rows], name)
            ids, mask = input_ids[rows, start:end], attention_mask[rows, start:end]
            if name == BASE:
                out = self.stand_in.original(
                    input_ids=ids, attention_mask=mask, output_hidden_states=True, return_dict=True
                )
            else:
                out = self.adapted(ids, mask, name)
            found.append((rows, start, end, out))

        def joined(part: Any) -> Tensor:
            """The rows' sequences at the places that their texts have in the batch."""
            parts = [part(out) for *_, out in found]
            whole = parts[0].new_zeros(len(names), input_ids.shape[1], parts[0].shape[-1])
            for (rows, start, end, _), states in zip(found, parts, strict=True):
                whole[rows, start:end] = states
                whole[rows, 0] = states[:, 0]  # who reads token states reads the first, also behind padding on the left
            return whole

        def pooled_of(out: Any) -> Tensor:
            pooled = getattr(out, "pooler_output", None)
            return out.last_hidden_state[:, 0] if pooled is None else pooled

        pooled = pooled_of(found[0][3])
        pooled = pooled.new_zeros(len(names), pooled.shape[-1])
        for rows, _, _, out in found:
            pooled[rows] = pooled_of(out)
        widths = {out.last_hidden_state.shape[-1] for *_, out in found}
        # A tower that pools to another width: nobody reads its token states.
        last = pooled[:, None] if len(widths) > 1 else joined(lambda o: o.last_hidden_state)
        hidden = joined(lambda o: o.hidden_states[-1]) if self.level == "tokens" else last
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=(hidden,))


# --- the model -------------------------------------------------------------------------------------------------------


@method(
    "cross_lingual_adapter",
    CrossLingualAdapterConfig,
    summary="An English model reads another language, from translation pairs alone; images and their index stay as they are.",
    docs="docs/cross-lingual-adapter.md",
    promises=Promises(
        starts_as="images",
        acts_on="tower",
        takes_targets=False,
        rows=True,
        companions=frozenset({"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}),
    ),
)
class CrossLingualAdapterModel(MultimodalTuner):
    """Gives a dual encoder, or a fusion model with a text tower of its own, another language.

    Example:
        >>> config = CrossLingualAdapterConfig(encoder="intfloat/multilingual-e5-small")
        >>> model = get_peft_model(clip, config, adapter_name="zh")
        >>> model.get_text_features(**zh_tokenizer(["一个红苹果"], return_tensors="pt")).pooler_output
        >>> with model.disable_adapter():  # English again
        ...     model.get_text_features(**en_tokenizer(["a red apple"], return_tensors="pt")).pooler_output
    """

    prefix = "cross_lingual_adapter_"
    tuner_layer_cls = CrossLingualAdapterLayer
    learning_rates = (3e-4, 1e-2)
    not_mergeable = (
        "A language's encoder takes the text tower's place; that is no weight update, so it can't be merged. Keep the "
        "adapter, or get the English model back by unload()."
    )

    @classmethod
    def match(cls, config: CrossLingualAdapterConfig, model: nn.Module) -> list[Site]:
        found, model = describe(model), base_model(model)
        path = text_tower(model, found)
        dim = _output_dim(model.get_submodule(path), level_of(config, model, found))
        return [Site(path, "tower", "text", "text.tower.0", config.encoder_width or 0, dim)]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        found = describe(self.model)
        path = text_tower(self.model, found)
        level = level_of(peft_config, self.model, found)
        present = self.language_tower()
        if present is not None and present.level != level:
            raise ValueError(f"The model's adapters have level={present.level!r}; one with {level!r} can't join them.")
        tower = self.model.get_submodule(path)
        dim = _output_dim(tower, level)
        if peft_config.is_loaded and peft_config.output_dim not in (None, dim):
            raise ValueError(
                f"This adapter belongs to another base: it gives {peft_config.output_dim} features, the text tower of "
                f"{found.model_class} {dim}."
            )
        self._loaded = load_encoder(peft_config, None if present is None else present.encoders)
        if any(module is tower for module in self._loaded.module.modules()):
            raise ValueError(
                "The encoder is the model's own text tower, whose place it is to take. Pass a copy: copy.deepcopy(encoder)."
            )
        follow(self._loaded.module, tower, keep_dtype=peft_config._given is not None)
        if peft_config.level != level:
            peft_config.level = peft_config._measured_level = level
        peft_config.output_dim = dim
        peft_config._loaded = self._loaded
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        anchor = next(p for p in token_embeddings(self.model) if is_below(p, path))  # PEFT passes over the root
        self._tower_path, self._matched = path, {anchor: self._matched[path]}
        return peft_config

    def check_model(self, config: CrossLingualAdapterConfig, matrices: list[Site], found: Anatomy) -> None:
        inside = [
            f"{name!r} ({path})"
            for name in config.modules_to_save or ()
            for path in own_modules(self.model)
            if (path == name or path.endswith(f".{name}")) and is_below(path, matrices[0].module)
        ]
        if inside:
            raise ValueError(f"modules_to_save={inside[0]} lies in the text tower, which doesn't run: it can't train.")

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str,
        parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        part = self.language_tower()
        if part is None:
            tower = self.model.get_submodule(self._tower_path)
            part = LanguageTower(self.model, tower, peft_config.level)
            tower.add_module("cross_lingual_adapter_tower", part)
        training = part.host().training  # no dropout in a model that stands in eval mode
        part.add(adapter_name, peft_config, self._loaded.module)
        part.train(training)
        if adapter_name not in self.active_adapters:
            part.cross_lingual_adapter_language[adapter_name].requires_grad_(False)

    def card_notes(self, adapter_name: str) -> CardNotes:
        """A language is an adapter: one called by a language's code is said to read it."""
        return CardNotes(languages=[adapter_name] if re.fullmatch("[a-z]{2}", adapter_name) else [])

    def language_tower(self) -> LanguageTower | None:
        """The part that holds the languages."""
        return next((m for m in self.model.modules() if isinstance(m, LanguageTower)), None)

    @torch.no_grad()
    def start_at(self, mean: Tensor, adapter_name: str) -> None:
        """Let b_up start at the mean teacher vector (d_t), which all texts have in common.

        An adapter on the meta device, whose weights are yet to be loaded, is left alone.
        """
        part: Any = self.language_tower()
        bias = part.cross_lingual_adapter_language[adapter_name].up.bias
        if not bias.is_meta:
            bias.copy_(mean)

    @contextmanager
    def rows(self, adapter_names: Sequence[str], inputs: Collection[Any]) -> Iterator[None]:
        part: Any = self.language_tower()
        with part.rows(adapter_names, inputs):
            yield


def text_tower(model: nn.Module, found: Anatomy) -> str:
    """Path of the text tower that can be replaced as a whole.

    Raises:
        NoMatchingPeftModuleError: the model has none; the message says why and what to use.
    """
    towers = [t for t in found.towers if t.name == "text" and t.attentions]
    embeddings = token_embeddings(model)
    instead = (
        "Use a dual encoder (CLIP, SigLIP, VisionTextDualEncoder, ...) or a fusion model whose text encoder stands apart "
        "(FLAVA)"
    )
    if not embeddings and not towers:
        raise NoMatchingPeftModuleError(
            f"{found.model_class} has no text encoder: nothing in it reads text. {instead}."
        )
    instead += ", or train this one on the language with AuroraModeApprox."
    if found.fusion_layers:
        raise NoMatchingPeftModuleError(
            f"{found.model_class} reads the picture inside its text layers ("
            + found.fusion_layers[0]
            + ", ...), so its text "
            f"encoder can't be exchanged for another language's. {instead}"
        )
    towers = [t for t in towers if any(is_below(e, t.path) for e in embeddings)]
    if len(towers) != 1 or found.media_tokens or (not towers[0].path and _sees(model)):
        one = "its decoder reads the text" if found.tower_names() == ["decoder"] else "one stack reads text and image"
        read = "several text towers" if len(towers) > 1 else f"no text encoder of its own: {one}"
        raise NoMatchingPeftModuleError(f"{found.model_class} has {read}. {instead}")
    path = towers[0].path
    if not path:  # the text side alone; its projection stands behind the tower
        children = [name for name, _ in model.named_children()]
        if any("projection" in name for name in children):
            return next((n for n in children if any(is_below(e, n) for e in embeddings)), path)
    return path


def _sees(model: nn.Module) -> bool:
    """Whether the forward of a model takes pictures, or features of them."""
    return any(name.startswith(("pixel", "visual", "image")) for name in inspect.signature(model.forward).parameters)


def level_of(config: CrossLingualAdapterConfig, model: nn.Module, found: Anatomy) -> str:
    """What the rest of the model reads of the text tower: its pooled output, or (a fusion encoder) its tokens' states.

    A fusion encoder reads them if a map leads from the text's width into it, beside the one into the shared space.
    """
    if config.level is not None and config.level != config._measured_level:
        return config.level
    width = {t.name: t.hidden_size for t in found.towers}
    maps = [
        module
        for path, module in own_modules(model).items()
        if isinstance(module, nn.Linear) and re.search(r"text_(?!projection)", path.rpartition(".")[2])
    ]
    reads = any((m.in_features, m.out_features) == (width["text"], width.get("fusion")) for m in maps)
    return "tokens" if reads else "pooled"


def _final_norm(tower: nn.Module) -> nn.Module | None:
    """The norm behind the last layer, if the tower has one: then the last of its `hidden_states` stands before it."""
    norms = [m for m in tower.children() if "Norm" in type(m).__name__]
    return norms[0] if len(norms) == 1 else None


def _teaching(tower: Any, forward: Any, level: str, input_ids: Tensor, attention_mask: Tensor | None) -> Teaching:
    tokens = level == "tokens"
    out = forward(
        input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=tokens or None, return_dict=True
    )
    if tokens:
        states = out.last_hidden_state if _final_norm(tower) is None else out.hidden_states[-1]
        return Teaching(states[:, 0], states)
    pooled = getattr(out, "pooler_output", None)
    return Teaching(out.last_hidden_state[:, 0] if pooled is None else pooled, None)


@torch.no_grad()
def _output_dim(tower: Any, level: str) -> int:
    """d_t, measured.

    Raises:
        ValueError: level="tokens", but what stands behind the tower's layers pools another token than the first.
    """
    device = device_of(tower)
    last = getattr(tower.config, "eos_token_id", None)
    modules: dict[str, Any] = own_modules(tower)
    size = min(modules[path].num_embeddings for path in token_embeddings(tower))
    ids = torch.tensor([[0, 1, last if isinstance(last, int) and last < size else 2]], device=device) % size
    part: Any = next((m for m in tower.children() if isinstance(m, LanguageTower)), None)
    forward = tower.forward if part is None else part.stand_in.original
    # Of a model on the meta device only shapes are known, and what a mask holds would be asked.
    mask = None if ids.is_meta else torch.ones_like(ids)
    out = forward(input_ids=ids, attention_mask=mask, return_dict=True)
    pooled = getattr(out, "pooler_output", None)
    if level == "pooled":
        return (out.last_hidden_state if pooled is None else pooled).shape[-1]
    pooler = getattr(tower, "pooler", None)
    first = out.last_hidden_state[:, 0] if pooler is None else pooler(out.last_hidden_state)
    if pooled is not None and not pooled.is_meta and not torch.allclose(first, pooled, atol=1e-4):
        raise ValueError(
            f"level='tokens' doesn't fit {type(tower).__name__}, which doesn't pool its first token. Use level='pooled'."
        )
    return out.last_hidden_state.shape[-1]
