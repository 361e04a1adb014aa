"""GatedXAttn: a frozen language model sees, through gated cross-attention (Alayrac et al., "Flamingo", arXiv 2204.14198).

A frozen vision encoder's features of each image or video become R tokens m (`nn/perceiver.py`). Before every n-th frozen
layer of a decoder stands a block that reads them, with y in R^{B x L x d} the decoder's stream:

    y1 = y  + tanh(a_x) XAttn(LN(y), m)                     Q = LN(y) W_q; K, V = m W_kv; out W_o; no biases
    y2 = y1 + tanh(a_f) FFW(LN(y1))                         d -> ff_mult d -> d, exact GELU
    then the frozen layer runs on y2

At the start either the gates a_x and a_f are 0, as in the paper, or they are open (`gate_init`) and the output matrices
behind them are 0: then all of them learn from the first step, where closed gates let no gradient through. Either way the
model starts as the language model, to the last bit, whatever it is shown. A token reads the last image before it
(`nn/media.py`); earlier images reach it through the decoder's own attention. Where there is no image XAttn is exactly 0;
FFW acts on every token, as in the paper.

Images stand in the text as markers. The marker's row of the embedding is the only one that trains. It is put in place of
what the frozen embedding gives, so the marker may be an id beyond the vocabulary.

Parameters, at I = heads d_h: a block has 2 d + d I + 2 D I + I d + 1, and 2 d + 2 ff_mult d^2 + 1 for its FFW; with them
the resampler's and the marker's row, once.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import NoMatchingPeftModuleError
from torch import nn

from ...core.anatomy import Anatomy, Site, own_modules
from ...core.config import MultimodalConfig, takes_no_targets
from ...core.registry import Promises, Use, method
from ...core.sites import Decoder
from ...core.tuner import Injection, MultimodalTuner
from ...encoders.frozen import follow, give_encoder, given_encoder, is_given
from ...encoders.vision import has_encoder, load_vision_encoder, place_of
from ...nn.media_inputs import Seeing
from ...nn.perceiver import LinearResampler, MeanResampler, PerceiverResampler, Resampler
from .checks import check_marker, check_vocabulary, find_decoder, warn_of_size
from .layers import GatedBlock, GatedXAttnLayer, GatedXAttnReader, MarkerEmbedding, SeeingLayer


@takes_no_targets("decoder", "every_n_layers chooses the decoder's layers")
@dataclass
class GatedXAttnConfig(MultimodalConfig):
    """Configuration of [`GatedXAttnModel`].

    Args:
        media_token_id: The marker that stands for an image or video in `input_ids`; it may lie beyond the vocabulary.
            `InterleavedProcessor.media_token_id`.
        vision_encoder: The frozen vision encoder: a Hub id or a folder for `AutoModel`, whose vision tower is taken.
            `with_vision_encoder` takes a module instead. None where calls bring `vision_features`.
        vision_encoder_revision: Its commit, tag or branch; filled in with the commit that was loaded.
        vision_hidden_size: Width D of its features; measured where there is an encoder.
        resampler: What makes R tokens of an image's features.

            - "linear": a linear map of the frames' mean; R is the encoder's number S of places.
            - "perceiver": the paper's. It tells a video's frames apart and makes `num_latents` tokens of any number
              of features, and takes more data to train.
            - "mean": one token, for ablations.
        num_latents: R of the Perceiver resampler, the tokens of one image.
        resampler_depth: Its layers (the paper has 6).
        resampler_heads: Heads of the attentions of the resampler and of the blocks.
        head_dim: Width of a head there: I = heads head_dim.
        max_frames: Learned embeddings of a video's frames; longer videos get interpolated ones.
        every_n_layers: A block stands before layer l = 0, 1, ... where l + 1 is a multiple of it. None: filled in with a
            fifth of the decoder's layers, which gives five to nine blocks (the paper has 1 to 7).
        ff_mult: Width of a block's FFW in multiples of d (the paper has 4); 0 leaves the attention alone.
        gate: "scalar", "vector" (one for each of the d channels), or for ablations "none": then the model doesn't start
            as the language model.
        gate_init: a_x and a_f at the start. With another value than 0 the blocks' output matrices start at 0: the model
            starts as the language model, and learns to see from the first step. With the paper's 0 the gates alone have
            gradients at first, and a run of some hundred steps may never open them.
        attend: "last", the last image before a token, or "all_previous".
        share_blocks: One block for all layers.
        vision_encoder_type: Filled in; checked on loading.

    The other arguments are those of [`MultimodalConfig`].

    Raises:
        ValueError: a field has a wrong value.

    Examples:
        >>> GatedXAttnConfig(vision_encoder="facebook/dinov2-small", media_token_id=49152, every_n_layers=6)
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
        marker = "an integer >= 0, such as InterleavedProcessor.media_token_id"
        self.check("media_token_id", marker, lambda v: type(v) is int and v >= 0)
        for name in ("num_latents", "resampler_heads", "head_dim", "max_frames"):
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
        self.check_flags("share_blocks")
        self.check_strings("vision_encoder", "vision_encoder_revision", "vision_encoder_type")
        self.check_sizes("vision_hidden_size", "every_n_layers")

    def with_vision_encoder(self, encoder: nn.Module) -> GatedXAttnConfig:
        """Take this module for the vision encoder; returns the config, which names where the module says it is from.

        Args:
            encoder: A vision model that reads `pixel_values` (N, C, H, W) alone.
        """
        give_encoder(self, encoder, encoder, "vision_encoder")
        return self


# --- the model -------------------------------------------------------------------------------------------------------


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


def spacing(config: GatedXAttnConfig, decoder: Decoder) -> int:
    """`every_n_layers`, or what stands for None."""
    return config.every_n_layers or max(1, len(decoder.layers) // 5)


def count_parameters(config: GatedXAttnConfig, width: int, blocks: int) -> int:
    """What an adapter trains, but for the marker's row."""
    with torch.device("meta"):
        block = make_block(config, width)
        modules = [make_resampler(config), *[block] * (1 if config.share_blocks else blocks)]
    return sum(p.numel() for module in modules for p in module.parameters())


@method(
    "gated_xattn",
    GatedXAttnConfig,
    summary="A frozen language model sees: images and videos between its words, in context and in generation.",
    use=Use(
        have="a language model, and images or videos",
        want="a language model that uses images, also in context",
        cost="8.4M parameters for SmolLM2-135M",
        compare="a model that sees already (LLaVA, Qwen-VL) with LoRA: GatedXAttn starts untrained and needs more data",
    ),
    docs="docs/gated-xattn.md",
    promises=Promises(acts_on="decoder"),
    smallest=lambda: GatedXAttnConfig(media_token_id=0),
)
class GatedXAttnModel(MultimodalTuner):
    """Lets a frozen decoder see images and videos that are interleaved with its text (arXiv 2204.14198).

    Inputs of a call beside the model's own, in `forward` and in `generate`:

    - `pixel_values`: images (B, T, C, H, W) or videos (B, T, F, C, H, W), for the config's vision encoder; a model
      that reads `pixel_values` itself gets features instead;
    - `vision_features`: (B, T, F, S, D), in their place;
    - `frame_mask`: (B, T, F), True where a frame is one, for videos of different length;
    - `media`: a `MediaCache`, for a conversation over several calls.

    A row with n markers reads its first n images; what stands behind them is padding.

    Source: Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning", arXiv 2204.14198.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoImageProcessor, AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> tokenizer.pad_token = tokenizer.eos_token
        >>> processor = InterleavedProcessor(tokenizer, AutoImageProcessor.from_pretrained("facebook/dinov2-small"))
        >>> config = GatedXAttnConfig(vision_encoder="facebook/dinov2-small", media_token_id=processor.media_token_id)
        >>> model = get_peft_model(lm, config).eval()
        >>> batch = processor(["<image>a red apple. <image>a green"], images=[[apple, pear]])
        >>> model.generate(**batch, num_beams=3, max_new_tokens=5)
    """

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
    def sites(cls, config: GatedXAttnConfig, model: nn.Module, anatomy: Anatomy) -> list[Site]:
        """The token embedding, and every n-th layer of the decoder."""
        decoder = find_decoder(model, anatomy)
        n = spacing(config, decoder)
        chosen = [(i, path) for i, path in enumerate(decoder.layers) if (i + 1) % n == 0]
        if not chosen:
            raise NoMatchingPeftModuleError(
                f"every_n_layers={config.every_n_layers}, but the decoder of {anatomy.model_class} has {len(decoder.layers)} "
                "layers."
            )
        embedding: Any = own_modules(model)[decoder.embedding]
        rows, row = embedding.num_embeddings, embedding.embedding_dim
        marker = Site(decoder.embedding, "marker", "decoder", "decoder.marker.0", rows, row)
        d, d_in = decoder.width, config.vision_hidden_size or 0
        return [marker, *(Site(path, "layer", "decoder", f"decoder.layer.{i}", d_in, d) for i, path in chosen)]

    def check(self, config: GatedXAttnConfig, sites: list[Site], anatomy: Anatomy) -> None:
        present = self.reader()  # it has taken the model's forward over
        own = inspect.signature(self.model.forward).parameters if present is None else present.own_inputs
        if has_encoder(config) and "pixel_values" in own:
            raise ValueError(
                f"{anatomy.model_class} reads pixel_values itself, so vision_encoder= would get none. Leave it out, set "
                "vision_hidden_size=D and pass vision_features (B, T, F, S, D)."
            )
        if not has_encoder(config) and config.vision_hidden_size is None:
            raise ValueError(
                "GatedXAttn needs vision_encoder=, the Hub id or folder of a frozen vision encoder, or the width "
                "vision_hidden_size= of features that calls bring as vision_features."
            )
        check_vocabulary(config, sites[0].d_in, anatomy.model_class)
        if not config.is_loaded:
            check_marker(config.media_token_id, self.model)

    def prepare(self, config: GatedXAttnConfig, sites: list[Site], anatomy: Anatomy) -> nn.Module | None:
        """The vision encoder."""
        decoder, present = find_decoder(self.model, anatomy), self.reader()
        config.every_n_layers = spacing(config, decoder)
        encoder = load_vision_encoder(config, None if present is None else present.encoders)
        if encoder is not None:
            follow(encoder, self.model.get_submodule(sites[1].module), keep_dtype=given_encoder(config) is not None)
        if not config.is_loaded:
            blocks = len(sites) - 1
            made_of = f"{blocks} blocks with ff_mult={config.ff_mult}, and a resampler {config.resampler!r} with "
            made_of += f"resampler_depth={config.resampler_depth}"
            warn_of_size(count_parameters(config, decoder.width, blocks), self.model, made_of)
        return encoder

    def signature(self, sites: list[Site], anatomy: Anatomy) -> dict[str, Any]:
        return super().signature(sites, anatomy) | {"vocabulary": sites[0].d_in}

    def stores(self, injection: Injection) -> list[Site]:
        d = injection.sites[1].d_out
        return [Site("", "reader", "decoder", "", d, d)]

    def make(self, injection: Injection, site: Site, module: nn.Module) -> GatedXAttnLayer:
        if site.kind == "reader":
            return GatedXAttnReader(module, module.get_submodule(find_decoder(module, injection.anatomy).stack))
        if site.kind == "marker":
            return MarkerEmbedding(module, site.role)
        reader: Any = self.reader()
        return SeeingLayer(module, reader, site.role)

    def add(self, injection: Injection, site: Site, part: Any) -> None:
        name, config, encoder = injection.adapter_name, injection.config, injection.prepared
        if site.kind == "reader":
            seeing = Seeing(config.media_token_id, config.attend, config.vision_hidden_size)
            resampler = make_resampler(config)  # drawn first: a seed gives the same adapter in every release
            shared = make_block(config, site.d_out) if config.share_blocks else None
            place = None if encoder is None else place_of(config)
            part.add(name, seeing, resampler, shared, encoder, place)
        elif site.kind == "marker":
            part.add(name, config.media_token_id)
        else:
            part.add(name, None if config.share_blocks else make_block(config, site.d_out))

    @classmethod
    def save_companions(cls, model: nn.Module, config: Any, adapter_name: str, folder: Path) -> None:
        """No copy of the vision encoder. A warning comes if the folder's name for it leads nowhere else."""
        key = next(m for m in model.modules() if isinstance(m, GatedXAttnReader)).encoder_of.get(adapter_name)
        if key is not None and (is_given(key) or Path(config.vision_encoder).is_dir()):
            warnings.warn(
                f"The adapter's folder names its vision encoder by {config.vision_encoder!r}, which is no commit on the Hub, "
                "and holds no copy of it. Elsewhere it loads only with that encoder at hand: config = "
                "PeftConfig.from_pretrained(folder), then config.vision_encoder = ... or "
                "config.with_vision_encoder(module), and pass config=config.",
                stacklevel=6,
            )

    def reader(self) -> GatedXAttnReader | None:
        """The part that takes the images out of a call."""
        return next((m for m in self.model.children() if isinstance(m, GatedXAttnReader)), None)
