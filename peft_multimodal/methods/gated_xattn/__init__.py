"""GatedXAttn: a frozen language model sees, through gated cross-attention (Alayrac et al., "Flamingo", arXiv 2204.14198).

A frozen vision encoder's features of each picture or video become R tokens m (`perceiver.py`). Before every n-th frozen
layer of a decoder stands a block that reads them, with y in R^{B x L x d} the decoder's stream:

    y1 = y  + tanh(a_x) XAttn(LN(y), m)                     Q = LN(y) W_q; K, V = m W_kv; out W_o; no biases
    y2 = y1 + tanh(a_f) FFW(LN(y1))                         d -> ff_mult d -> d, exact GELU
    then the frozen layer runs on y2

At the start either the gates a_x and a_f are 0, as in the paper, or they are open (`gate_init`) and the output matrices
behind them are 0: then all of them learn from the first step, where closed gates let no gradient through. Either way the
model starts as the language model, to the last bit, whatever it is shown. A text token reads the last picture before it
(`media.py`); earlier ones reach it through the decoder's own attention.
Where there is no picture XAttn is exactly 0; FFW acts on every token, as in the paper.

Pictures stand in the text as markers. The marker's row of the embedding is the only one that trains; it is put in
place of what the frozen embedding gives, so that the marker may also be an id beyond the vocabulary.

Parameters, at I = heads d_h: a block has 2 d + d I + 2 D I + I d + 1, and 2 d + 2 ff_mult d^2 + 1 for its FFW; with them
the resampler's and the marker's row, once.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import NoMatchingPeftModuleError
from peft.utils import PeftType
from torch import nn

from ...core.anatomy import (
    Anatomy,
    Site,
    base_model,
    describe,
    is_below,
    layer_of,
    own_modules,
    stack_of,
    token_embeddings,
    unwrap,
)
from ...core.config import MultimodalConfig
from ...core.registry import Promises, method
from ...core.tuner import MultimodalTuner
from ...encoders.frozen import follow
from ...encoders.vision import load_vision_encoder, place_of
from ...nn.perceiver import LinearResampler, MeanResampler, PerceiverResampler, Resampler
from .layers import (
    GatedBlock,
    GatedXAttnLayer,
    MarkerEmbedding,
    MediaReader,
    Seeing,
    SeeingLayer,
)


@dataclass
class GatedXAttnConfig(MultimodalConfig):
    """Configuration of [`GatedXAttnModel`].

    Args:
        media_token_id: The marker that stands for a picture or video in `input_ids`; it may lie beyond the vocabulary.
            `InterleavedProcessor.media_token_id`.
        vision_encoder: The frozen vision encoder: a Hub id or a folder for `AutoModel`, of whose model the vision tower
            is taken. `with_vision_encoder` takes a module instead. None where calls bring `vision_features`.
        vision_encoder_revision: Its commit, tag or branch; filled in with the commit that was loaded.
        vision_hidden_size: Width D of its features; measured where there is an encoder.
        resampler: "linear", a linear map of the frames' mean, whose R tokens are the encoder's S places; "perceiver", the
            paper's, which tells a video's frames apart, makes `num_latents` tokens of any number of features, and takes
            more data to train; or for ablations "mean" (one token).
        num_latents: R of the Perceiver resampler, the tokens of one picture.
        resampler_depth: Its layers (the paper has 6).
        resampler_heads, head_dim: Of the attentions of the resampler and of the blocks: I = heads head_dim.
        max_frames: Learned embeddings of a video's frames; longer videos get interpolated ones.
        every_n_layers: A block stands before layer l = 0, 1, ... where l + 1 is a multiple of it. None: filled in with a
            fifth of the decoder's layers, which gives five to nine blocks (the paper has 1 to 7).
        ff_mult: Width of a block's FFW in multiples of d (the paper has 4); 0 leaves the attention alone.
        gate: "scalar", "vector" (one for each of the d channels), or for ablations "none": then the model doesn't start
            as the language model.
        gate_init: a_x and a_f at the start. With another value than 0 the blocks' output matrices start at 0: the model
            starts as the language model, and learns to see from the first step. With the paper's 0 the gates alone have
            gradients at first, and a run of some hundred steps may never open them.
        attend: "last", the last picture before a token, or "all_previous".
        share_blocks: One block for all layers.
        vision_encoder_type: Filled in; checked on loading.
    """

    media_token_id: int | None = None
    vision_encoder: str | None = None
    vision_encoder_revision: str | None = None
    vision_hidden_size: int | None = None
    resampler: str = "linear"
    num_latents: int = 64
    resampler_depth: int = 2
    resampler_heads: int = 8
    head_dim: int = 64
    max_frames: int = 8
    every_n_layers: int | None = None
    ff_mult: int = 1
    gate: str = "scalar"
    gate_init: float = 1.0
    attend: str = "last"
    share_blocks: bool = False
    vision_encoder_type: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("GATED_XATTN")
        marker = "an integer >= 0, such as InterleavedProcessor.media_token_id"
        self.check("media_token_id", marker, lambda v: type(v) is int and v >= 0)
        for name in ("num_latents", "resampler_depth", "resampler_heads", "head_dim", "max_frames"):
            self.check_number(name, 1, integer=True)
        self.check_number("resampler_depth", 1, 1000, integer=True)
        self.check_number("ff_mult", 0, integer=True)
        self.check_choice("resampler", ("perceiver", "linear", "mean"))
        self.check_choice("gate", ("scalar", "vector", "none"))
        self.check_choice("attend", ("last", "all_previous"))
        self.check_number("gate_init", -10, 10)
        self.check(
            "gate_init", "left out where gate='none'", lambda v: self.gate != "none" or v in (0, type(self).gate_init)
        )
        self.check_flag("share_blocks")
        for name in ("vision_encoder", "vision_encoder_revision", "vision_encoder_type"):
            self.check(name, "a string or None", lambda v: v is None or (isinstance(v, str) and v))
        for name in ("vision_hidden_size", "every_n_layers"):
            self.check(name, "a positive integer or None", lambda v: v is None or (type(v) is int and v > 0))
        for name in ("target_modules", "exclude_modules", "layers_to_transform"):
            self.check(name, "None: every_n_layers chooses the decoder's layers", lambda v: v is None)
        self.check("towers", "None or ['decoder']", lambda v: v is None or list(v) == ["decoder"])
        self._given: nn.Module | None = None  # not saved

    def with_vision_encoder(self, encoder: nn.Module) -> GatedXAttnConfig:
        """Take this module for the vision encoder; returns the config, which names where the module says it is from."""
        self._given = encoder
        name = getattr(getattr(encoder, "config", None), "name_or_path", None)
        self.vision_encoder = self.vision_encoder or name or None
        return self

    @property
    def has_encoder(self) -> bool:
        return self._given is not None or self.vision_encoder is not None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        if self._given is not None or (self.vision_encoder is not None and Path(self.vision_encoder).is_dir()):
            warnings.warn(
                f"The adapter's folder names its vision encoder by {self.vision_encoder!r}, which is no commit on the Hub, "
                "and holds no copy of it. Elsewhere it loads only with that encoder at hand: config = "
                "PeftConfig.from_pretrained(folder), then config.vision_encoder = ... or "
                "config.with_vision_encoder(module), and pass config=config.",
                stacklevel=2,
            )
        super().save_pretrained(save_directory, **kwargs)


# --- the model -------------------------------------------------------------------------------------------------------


class Decoder(NamedTuple):
    """Where a model keeps its decoder; paths of modules."""

    stack: str  # whose forward runs the layers
    layers: list[str]
    embedding: str
    width: int  # d


def find_decoder(model: Any, found: Anatomy) -> Decoder:
    """The decoder of a language model, or of the language model inside a vision-language model.

    Raises:
        NoMatchingPeftModuleError: there is none that reads text alone; the message says why and what to use.
    """
    instead = "Use a decoder-only language model (Llama, Qwen, Gemma, Mistral, OPT, GPT-2, ...)."
    towers = [t for t in found.towers if t.name == "decoder"]
    if not towers:
        raise NoMatchingPeftModuleError(
            f"GatedXAttn stands before the layers of a decoder; {found.model_class} has none. {instead}"
        )
    root = towers[0].path
    if not towers[0].attentions and getattr(model, "_is_stateful", False):
        raise NoMatchingPeftModuleError(
            f"{found.model_class} keeps a recurrent state in place of attention's keys and values, by which GatedXAttn "
            f"knows where in its text generation is. {instead}"
        )
    configs = configs_of(model)
    if any((getattr(c, "hc_mult", None) or 1) > 1 for c in configs):
        raise NoMatchingPeftModuleError(
            f"The layers of {found.model_class} pass several streams of states on (hyper-connections), and GatedXAttn adds to "
            f"one. {instead}"
        )
    numbered = [m for m in found.matrices if m.tower == "decoder" and layer_of(m.module)]
    # Attention tells the layers from other lists. Not every family's is known: some fuse q, k and v head by head, or
    # factorise them; their layers are then the only list there is.
    queries = [m for m in numbered if m.letter in ("q", "qkv")]
    lists = {stack_of(m.module) for m in queries or numbered}
    embeddings = [e for e in token_embeddings(model) if is_below(e, root)]
    two = any(t.name == "text" for t in found.towers) or any(getattr(c, "is_encoder_decoder", False) for c in configs)
    if len(towers) > 1 or two or len(lists) != 1 or not embeddings:
        raise NoMatchingPeftModuleError(
            f"{found.model_class} has no single stack of decoder layers that reads the text (an encoder and a decoder, or "
            f"several). GatedXAttn stands before the layers of one decoder. {instead}"
        )
    (stack,) = lists
    modules = own_modules(model)
    layers = [path for path in modules if path.rpartition(".")[0] == stack and path.rpartition(".")[2].isdigit()]
    primary = unwrap(model.get_input_embeddings())
    embedding = next((e for e in embeddings if modules[e] is primary), embeddings[0])
    width: Any = towers[0].hidden_size or configs[-1].hidden_size
    return Decoder(stack.rpartition(".")[0], layers, embedding, width)


def configs_of(model: Any) -> list[Any]:
    """The model's config and that of its text part, as far as it has them."""
    config: Any = getattr(model, "config", None)
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # none of transformers', or of several text parts
        text = None
    return [c for c in (config, text) if c is not None]


def check_vocabulary(config: GatedXAttnConfig, size: int, model_class: str) -> None:
    """Refuse a base that knows more or fewer tokens than the one that the adapter was trained on.

    Its widths may agree, and yet the marker and every other id would mean something else.
    """
    trained = (config.base_signature or {}).get("vocabulary") if config.is_loaded else None  # older files don't say
    if trained not in (None, size):
        raise ValueError(
            f"This adapter belongs to another base: it was trained on {config.base_model_name_or_path or 'one'} with an "
            f"embedding of {trained} tokens, this {model_class} has {size}. Load the base that the adapter's "
            "adapter_config.json names; if it was resized then, resize it now: "
            f"model.resize_token_embeddings({trained})."
        )


def spacing(config: GatedXAttnConfig, decoder: Decoder) -> int:
    """`every_n_layers`, or what stands for None."""
    return config.every_n_layers or max(1, len(decoder.layers) // 5)


def check_marker(config: GatedXAttnConfig, model: Any) -> None:
    """Refuse a token of the language model's own, which a tokenizer gives for a marker that it doesn't know."""
    for own in configs_of(model) if not config.is_loaded else ():
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(own, name, None)
            if config.media_token_id in (value if isinstance(value, list) else [value]):
                raise ValueError(
                    f"media_token_id={config.media_token_id} is the {name} of {type(model).__name__}, which no marker can be. A "
                    "tokenizer gives such a token for a marker that it doesn't know: take media_token_id= from "
                    "InterleavedProcessor(tokenizer, image_processor).media_token_id, which adds the marker."
                )


LARGE, SHARE = 10_000_000, 0.25
"""More parameters than this, and than this share of the model's, are worth a warning."""


def warn_of_size(config: GatedXAttnConfig, model: nn.Module, decoder: Decoder, blocks: int) -> None:
    """Say before anything is made how large a large adapter will be, and what makes it smaller."""
    count = count_parameters(config, decoder.width, blocks)
    whole = sum(p.numel() for p in model.parameters())
    if count > max(LARGE, SHARE * whole):
        warnings.warn(
            f"GatedXAttn will train {count:,} parameters ({4 * count / 1e6:,.0f} MB in float32), {count / whole:.0%} of the "
            f"{whole:,} of {type(model).__name__}: {blocks} blocks with ff_mult={config.ff_mult}, and a resampler "
            f"{config.resampler!r} with resampler_depth={config.resampler_depth}. A larger every_n_layers, ff_mult=1 or 0, "
            "resampler_depth=1, resampler='linear' or share_blocks=True make it smaller.",
            stacklevel=2,
        )


def count_parameters(config: GatedXAttnConfig, width: int, blocks: int) -> int:
    """What an adapter trains, but for the marker's row."""
    with torch.device("meta"):
        block = make_block(config, width)
        parts = [make_resampler(config), *[block] * (1 if config.share_blocks else blocks)]
    return sum(p.numel() for part in parts for p in part.parameters())


def make_block(config: GatedXAttnConfig, width: int) -> GatedBlock:
    """A block for a decoder of this width."""
    vision_width: Any = config.vision_hidden_size
    heads, head_dim = config.resampler_heads, config.head_dim
    return GatedBlock(width, vision_width, heads, head_dim, config.ff_mult, config.gate, config.gate_init)


def make_resampler(config: GatedXAttnConfig) -> Resampler:
    width: Any = config.vision_hidden_size
    if config.resampler != "perceiver":
        return (LinearResampler if config.resampler == "linear" else MeanResampler)(width, config.max_frames)
    sizes = (config.num_latents, config.resampler_depth, config.resampler_heads, config.head_dim)
    return PerceiverResampler(width, config.max_frames, *sizes)


@method(
    "gated_xattn",
    GatedXAttnConfig,
    summary="A frozen language model sees: images and videos between its words, in context and in generation.",
    docs="docs/gated-xattn.md",
    promises=Promises(acts_on="decoder", takes_targets=False),
    smallest=lambda: GatedXAttnConfig(media_token_id=0),
)
class GatedXAttnModel(MultimodalTuner):
    """Lets a frozen decoder see pictures and videos that are interleaved with its text (arXiv 2204.14198).

    Inputs of a call beside the model's own, in `forward` and in `generate`:

    - `pixel_values`: pictures (B, T, C, H, W) or videos (B, T, F, C, H, W), for the config's vision encoder; a model
      that reads `pixel_values` itself gets features instead;
    - `vision_features`: (B, T, F, S, D), in their place;
    - `frame_mask`: (B, T, F), True where a frame is one, for videos of different length;
    - `media`: a `MediaCache`, for a conversation over several calls.

    A row with n markers reads its first n pictures; what stands behind them is padding.

    Example:
        >>> processor = InterleavedProcessor(tokenizer, image_processor)
        >>> config = GatedXAttnConfig(vision_encoder="facebook/dinov2-small", media_token_id=processor.media_token_id)
        >>> model = get_peft_model(lm, config)
        >>> model.generate(**processor(["<image>a red apple. <image>a green"], images=[[apple, pear]]), num_beams=3)
    """

    prefix = "gated_xattn_"
    tuner_layer_cls = GatedXAttnLayer
    learning_rates = (3e-4, 5e-3)
    uses_shared_state = True  # the reader's
    wraps = True
    not_mergeable = (
        "Gated cross-attention is no weight update, so it can't be merged. Keep the adapter, or get the language model "
        "back by unload()."
    )
    owns_token_rows = True

    @classmethod
    def match(cls, config: GatedXAttnConfig, model: nn.Module) -> list[Site]:
        """The token embedding, and every n-th layer of the decoder."""
        found, model = describe(model), base_model(model)
        decoder = find_decoder(model, found)
        n = spacing(config, decoder)
        chosen = [(i, path) for i, path in enumerate(decoder.layers) if (i + 1) % n == 0]
        if not chosen:
            raise NoMatchingPeftModuleError(
                f"every_n_layers={config.every_n_layers}, but the decoder of {found.model_class} has {len(decoder.layers)} "
                "layers."
            )
        embedding: Any = own_modules(model)[decoder.embedding]
        rows, row = embedding.num_embeddings, embedding.embedding_dim
        matrices = [Site(decoder.embedding, "marker", "decoder", "decoder.marker.0", rows, row)]
        d, d_in = decoder.width, config.vision_hidden_size or 0
        return matrices + [Site(path, "layer", "decoder", f"decoder.layer.{i}", d_in, d) for i, path in chosen]

    def check_model(self, config: GatedXAttnConfig, matrices: list[Site], found: Anatomy) -> None:
        present = self.reader()  # it has taken the model's forward over
        own = inspect.signature(self.model.forward).parameters if present is None else present.own_inputs
        if config.has_encoder and "pixel_values" in own:
            raise ValueError(
                f"{found.model_class} reads pixel_values itself, so vision_encoder= would get none. Leave it out, set "
                "vision_hidden_size=D and pass vision_features (B, T, F, S, D)."
            )
        if not config.has_encoder and config.vision_hidden_size is None:
            raise ValueError(
                "GatedXAttn needs vision_encoder=, the Hub id or folder of a frozen vision encoder, or the width "
                "vision_hidden_size= of features that calls bring as vision_features."
            )
        check_vocabulary(config, matrices[0].d_in, found.model_class)
        check_marker(config, self.model)
        self._decoder = find_decoder(self.model, found)
        config.every_n_layers = spacing(config, self._decoder)
        encoder = load_vision_encoder(config, None if present is None else present.encoders)
        if encoder is not None:
            follow(encoder, self.model.get_submodule(matrices[1].module), keep_dtype=config._given is not None)
        self._encoder = (encoder,)  # a tuple is not registered: the reader holds it
        if not config.is_loaded:
            warn_of_size(config, self.model, self._decoder, blocks=len(matrices) - 1)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        (marker,) = self._matched[self._decoder.embedding]
        peft_config.base_signature["vocabulary"] = marker.d_in
        return peft_config

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str,
        parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        reader = self.reader()
        if reader is None:
            reader = MediaReader(self.model, self.model.get_submodule(self._decoder.stack))
            reader.train(self.model.training)
            self.model.add_module("gated_xattn_reader", reader)
        if adapter_name not in reader.gated_xattn_resampler:
            (encoder,) = self._encoder
            seeing = Seeing(peft_config.media_token_id, peft_config.attend, peft_config.vision_hidden_size)
            resampler = make_resampler(peft_config)
            shared = make_block(peft_config, self._decoder.width) if peft_config.share_blocks else None
            place = None if encoder is None else place_of(peft_config)
            reader.add(adapter_name, seeing, resampler, shared, encoder, place)
            self._freeze_unless_active(reader, adapter_name)
        (matrix,) = self._matched[current_key]
        layer: Any = target
        if not isinstance(target, GatedXAttnLayer):
            if matrix.kind == "marker":
                layer = MarkerEmbedding(target, matrix.role)
            else:
                layer = SeeingLayer(target, reader, matrix.role)
            layer.train(target.training)
        if matrix.kind == "marker":
            layer.add(adapter_name, peft_config.media_token_id)
        else:
            layer.add(adapter_name, None if peft_config.share_blocks else make_block(peft_config, self._decoder.width))
        self._freeze_unless_active(layer, adapter_name)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _freeze_unless_active(self, layer: Any, adapter_name: str) -> None:
        for name in layer.adapter_layer_names if adapter_name not in self.active_adapters else ():
            container = getattr(layer, name)
            if adapter_name in container:
                container[adapter_name].requires_grad_(False)

    def reader(self) -> MediaReader | None:
        """The part that takes the pictures out of a call."""
        return next((m for m in self.model.children() if isinstance(m, MediaReader)), None)
