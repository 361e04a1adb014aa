"""CrossLingualAdapter: a frozen encoder of another language and a small adapter stand in for the English text tower.

Vision and language are decoupled in a dual encoder, so a language is added with translation pairs alone: a frozen
encoder S of that language and the adapter A are trained to give what the frozen English tower T gives for the
translation. Nothing else changes: images that were indexed before stay valid to the last bit.

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

import re
import warnings
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.anatomy import Anatomy, Site, is_below, own_modules
from ...core.companions import CardNotes
from ...core.config import MultimodalConfig, check_bottleneck, takes_no_targets
from ...core.registry import Promises, Use, method
from ...core.tuner import Injection, MultimodalTuner
from ...encoders.frozen import follow, give_encoder, given_encoder, is_given
from ...encoders.language import KEPT, KEPT_TOKENIZER, LanguageEncoder, load_encoder, place_of
from ...languages import multilingual_tower
from ...nn.transformer_block import TransformerBlock
from .text_tower import level_of, output_dim, text_tower
from .tower import CrossLingualAdapterLayer, LanguageTower


@takes_no_targets("text", "the text tower is replaced as a whole")
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
        pool: How y is taken from Y: "mean" over the text's tokens, "cls" (the first token) or "attention" (a learned
            query).
        level: "pooled" for dual encoders; "tokens" where a fusion encoder reads the text's token states (FLAVA). None
            takes what the model asks for; a text tower alone doesn't tell, so there None is "pooled".
        save_encoder: Keep a copy of the encoder in the adapter's folder, for one that is on no Hub.
        encoder_type: Filled in, and checked when the adapter is loaded.
        encoder_width: Filled in, and checked when the adapter is loaded.
        encoder_vocab_size: Filled in, and checked when the adapter is loaded.
        tokenizer_hash: Filled in, and checked when the adapter is loaded.
        output_dim: Filled in, and checked when the adapter is loaded.

    The other arguments are those of [`MultimodalConfig`].

    Raises:
        ValueError: a field has a wrong value.

    Examples:
        >>> CrossLingualAdapterConfig(encoder="intfloat/multilingual-e5-small", dropout=0.2)
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
        check_bottleneck(self)
        self.check_choice("pool", ("mean", "cls", "attention"))
        self.check("level", "'pooled', 'tokens' or None", lambda v: v in (None, "pooled", "tokens"))
        self.check_flags("save_encoder")
        self.check_strings("encoder", "encoder_revision", "encoder_type", "tokenizer_hash")
        self.check_sizes("encoder_width", "encoder_vocab_size", "output_dim")

    def with_encoder(self, encoder: nn.Module, tokenizer: Any = None) -> CrossLingualAdapterConfig:
        """Take this module (and its tokenizer) for the encoder; returns the config.

        The config records `encoder`, or where the module says that it came from. An encoder that was trained or
        changed here should be published, or kept with the adapter by `save_encoder=True`.

        Args:
            encoder: A model that gives token states (B, L, d_s).
            tokenizer: Its tokenizer, to be kept beside the adapter.
        """
        give_encoder(self, LanguageEncoder(encoder, tokenizer), encoder, "encoder")
        return self


# --- the adapter -----------------------------------------------------------------------------------------------------


class LanguageAdapter(nn.Module):
    """The module docstring's A: from the states of the language's encoder to those of the text tower.

    Args:
        width: d_s of the encoder.
        m, n: Width and transformer layers of the adapter.
        output_dim: d_t of the tower.
    """

    def __init__(
        self, width: int, m: int, n: int, output_dim: int, num_heads: int, ff_mult: int, dropout: float, pool: str
    ) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(width, m)
        self.blocks = nn.ModuleList(TransformerBlock(m, num_heads, ff_mult, dropout) for _ in range(n))
        self.up = nn.Linear(m, output_dim)
        nn.init.zeros_(self.up.bias)
        if pool == "attention":
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


# --- the model -------------------------------------------------------------------------------------------------------


@method(
    "cross_lingual_adapter",
    CrossLingualAdapterConfig,
    summary="An English model reads another language, from translation pairs alone; images and their index stay as they are.",
    use=Use(
        have="translation pairs, and no images",
        want="an English model that reads another language, and the index of images unchanged",
        cost="8,213 pairs: 88 seconds of one core",
        compare="a small MLP on the same language encoder (e5-small in our tests)",
    ),
    docs="docs/cross-lingual-adapter.md",
    promises=Promises(
        starts_as="images",
        acts_on="tower",
        rows=True,
        companions=frozenset({"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}),
    ),
)
class CrossLingualAdapterModel(MultimodalTuner):
    """Gives a dual encoder, or a fusion model with a text tower of its own, another language.

    Source: the linear head of Multilingual-CLIP (Carlsson et al. 2022) is `num_layers=0`; the frozen student with a
        bottleneck
    of transformer layers is the recipe of DAMO's talk on adapting CLIP to Chinese.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoTokenizer
        >>> config = CrossLingualAdapterConfig(encoder="intfloat/multilingual-e5-small")
        >>> model = get_peft_model(clip, config, adapter_name="zh")
        >>> chinese = AutoTokenizer.from_pretrained("intfloat/multilingual-e5-small")
        >>> model.get_text_features(**chinese(["一个红苹果"], return_tensors="pt")).pooler_output
        >>> english = AutoTokenizer.from_pretrained("openai/clip-vit-base-patch32")
        >>> with model.disable_adapter():  # English again
        ...     model.get_text_features(**english(["a red apple"], return_tensors="pt")).pooler_output
    """

    tuner_layer_cls = CrossLingualAdapterLayer
    learning_rates = (3e-4, 1e-2)
    not_mergeable = (
        "A language's encoder takes the text tower's place; that is no weight update, so it can't be merged. Keep the "
        "adapter, or get the English model back by unload()."
    )

    @classmethod
    def sites(cls, config: CrossLingualAdapterConfig, model: nn.Module, anatomy: Anatomy) -> list[Site]:
        path, present = text_tower(model, anatomy), multilingual_tower(model)
        tower = model.get_submodule(path)
        forward = tower.forward if present is None else present.stand_in.original
        dim = output_dim(tower, forward, config.level or level_of(model, anatomy))
        return [Site(path, "tower", "text", "text.tower.0", config.encoder_width or 0, dim)]

    def check(self, config: CrossLingualAdapterConfig, sites: list[Site], anatomy: Anatomy) -> None:
        (site,) = sites
        level, present = config.level or level_of(self.model, anatomy), self.language_tower()
        if present is not None and present.level != level:
            raise ValueError(f"The model's adapters have level={present.level!r}; one with {level!r} can't join them.")
        if config.is_loaded and config.output_dim not in (None, site.d_out):
            raise ValueError(
                f"This adapter belongs to another base: it gives {config.output_dim} features, the text tower of "
                f"{anatomy.model_class} {site.d_out}."
            )
        inside = [
            f"{name!r} ({path})"
            for name in config.modules_to_save or ()
            for path in own_modules(self.model)
            if (path == name or path.endswith(f".{name}")) and is_below(path, site.module)
        ]
        if inside:
            raise ValueError(f"modules_to_save={inside[0]} lies in the text tower, which doesn't run: it can't train.")

    def prepare(self, config: CrossLingualAdapterConfig, sites: list[Site], anatomy: Anatomy) -> LanguageEncoder:
        """The language's encoder."""
        (site,) = sites
        tower, present = self.model.get_submodule(site.module), self.language_tower()
        loaded = load_encoder(config, None if present is None else present.encoders)
        if any(module is tower for module in loaded.module.modules()):
            raise ValueError(
                "The encoder is the model's own text tower, whose place it is to take. Pass a copy: copy.deepcopy(encoder)."
            )
        follow(loaded.module, tower, keep_dtype=given_encoder(config) is not None)
        config.level, config.output_dim = config.level or level_of(self.model, anatomy), site.d_out
        return loaded

    def make(self, injection: Injection, site: Site, module: nn.Module) -> LanguageTower:
        return LanguageTower(self.model, module, injection.config.level)

    def add(self, injection: Injection, site: Site, part: LanguageTower) -> None:
        config = injection.config
        adapter = LanguageAdapter(
            config.encoder_width, config.bottleneck_dim, config.num_layers, config.output_dim, config.num_heads,
            config.ff_mult, config.dropout, config.pool,
        )  # fmt: skip
        part.add(injection.adapter_name, adapter, injection.prepared, place_of(config))

    @classmethod
    def save_companions(cls, model: nn.Module, config: Any, adapter_name: str, folder: Path) -> None:
        """The tokenizer's files, and with `save_encoder=True` the encoder."""
        part: Any = multilingual_tower(model)
        tokenizer = part.tokenizers[adapter_name]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / KEPT_TOKENIZER)
        if config.save_encoder:
            part.encoder(adapter_name).save_pretrained(folder / KEPT)
        elif config.encoder is None or Path(config.encoder).is_dir() or is_given(part.encoder_of[adapter_name]):
            warnings.warn(
                f"The adapter's folder names its language encoder by {config.encoder!r}, which is no commit on the "
                "Hub; elsewhere it loads only with that encoder at hand. Set "
                "model.peft_config[adapter_name].save_encoder = True to keep a copy in the folder, or publish the "
                "encoder and name its id.",
                stacklevel=6,
            )

    @classmethod
    def card_notes(cls, model: nn.Module, adapter_name: str) -> CardNotes:
        """A language is an adapter: one called by a language's code is said to read it."""
        return CardNotes(languages=[adapter_name] if re.fullmatch("[a-z]{2}", adapter_name) else [])

    def language_tower(self) -> LanguageTower | None:
        """The part that holds the languages."""
        return multilingual_tower(self.model)

    def rows(
        self, adapter_names: Sequence[str], inputs: Collection[Any], copies: int = 1
    ) -> AbstractContextManager[None]:
        part: Any = self.language_tower()
        return part.rows(adapter_names, inputs)
