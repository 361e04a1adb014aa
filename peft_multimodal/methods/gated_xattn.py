"""GatedXAttn: a frozen language model sees, through gated cross-attention (Alayrac et al., "Flamingo", arXiv 2204.14198).

A frozen vision encoder's features of each picture or video become R tokens m (`perceiver.py`). Before every n-th frozen
layer of a decoder stands a block that reads them, with y in R^{B x L x d} the decoder's stream:

    y1 = y  + tanh(a_x) XAttn(LN(y), m)                     Q = LN(y) W_q; K, V = m W_kv; out W_o; no biases
    y2 = y1 + tanh(a_f) FFW(LN(y1))                         d -> 4 d -> d, exact GELU
    then the frozen layer runs on y2

The gates a_x and a_f start at 0, so the model starts as the language model, to the last bit, whatever it is shown. A
text token reads the last picture before it (`media.py`); earlier ones reach it through the decoder's own attention.
Where there is no picture XAttn is exactly 0; FFW acts on every token, as in the paper.

Pictures stand in the text as markers. The marker's row of the embedding is the only one that trains; it is put in
place of what the frozen embedding gives, so that the marker may also be an id beyond the vocabulary.

Parameters, at I = heads d_h: a block has 2 d + d I + 2 D I + I d + 1, and 2 d + 2 ff_mult d^2 + 1 for its FFW; with them
the resampler's and the marker's row, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import Cache, LogitsProcessor, LogitsProcessorList

from ..anatomy import Anatomy, Matrix, base_model, describe, is_below, layer_of, own_modules, token_embeddings, unwrap
from ..registry import register
from ..tuner import AttachedPart, CallScope, HostedLayer, MultimodalConfig, MultimodalLayer, MultimodalTuner
from .frozen_encoder import follow
from .media import MediaCache, Sight, look, text_time
from .perceiver import (
    CrossAttention,
    KeysValues,
    LinearResampler,
    MeanResampler,
    PerceiverResampler,
    Resampler,
    feed_forward,
)
from .vision_encoder import frame_features, load_vision_encoder, vision_key


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
        resampler: "perceiver", or for ablations "linear" (a linear map of the frames' mean) or "mean" (one token).
        num_latents: R, the tokens of one picture.
        resampler_depth: Layers of the Perceiver resampler.
        resampler_heads, head_dim: Of the attentions of the resampler and of the blocks: I = heads head_dim.
        max_frames: Learned embeddings of a video's frames; longer videos get interpolated ones.
        every_n_layers: A block stands before layer l = 0, 1, ... where l + 1 is a multiple of it.
        ff_mult: Width of a block's FFW in multiples of d; 0 leaves the attention alone.
        gate: "scalar", "vector" (one for each of the d channels), or for ablations "none": then the model doesn't start
            as the language model.
        attend: "last", the last picture before a token, or "all_previous".
        share_blocks: One block for all layers.
        vision_encoder_type: Filled in; checked on loading.
    """

    media_token_id: int | None = None
    vision_encoder: str | None = None
    vision_encoder_revision: str | None = None
    vision_hidden_size: int | None = None
    resampler: str = "perceiver"
    num_latents: int = 64
    resampler_depth: int = 6
    resampler_heads: int = 8
    head_dim: int = 64
    max_frames: int = 8
    every_n_layers: int = 1
    ff_mult: int = 4
    gate: str = "scalar"
    attend: str = "last"
    share_blocks: bool = False
    vision_encoder_type: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("GATED_XATTN")
        self.check_number("media_token_id", 0, integer=True)
        names = ("num_latents", "resampler_depth", "resampler_heads", "head_dim", "max_frames", "every_n_layers")
        for name in names:
            self.check_number(name, 1, integer=True)
        self.check_number("ff_mult", 0, integer=True)
        self.check_choice("resampler", ("perceiver", "linear", "mean"))
        self.check_choice("gate", ("scalar", "vector", "none"))
        self.check_choice("attend", ("last", "all_previous"))
        self.check_flag("share_blocks")
        for name in ("vision_encoder", "vision_encoder_revision", "vision_encoder_type"):
            self.check(name, "a string or None", lambda v: v is None or (isinstance(v, str) and v))
        self.check(
            "vision_hidden_size", "a positive integer or None", lambda v: v is None or (type(v) is int and v > 0)
        )
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


# --- the block -------------------------------------------------------------------------------------------------------


class GatedBlock(nn.Module):
    """The module docstring's y -> y2.

    Args:
        width: d of the decoder.
        vision_width: D of the pictures' tokens.
    """

    def __init__(self, config: GatedXAttnConfig, width: int, vision_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, vision_width, config.resampler_heads, config.head_dim)
        self.attention_gate_norm = _gate(config.gate, width)  # names in `_norm` get no weight decay from Trainer
        self.ffw: nn.Module | None = None
        if config.ff_mult:
            self.ffw_norm = nn.LayerNorm(width)
            self.ffw = feed_forward(width, config.ff_mult)
            self.ffw_gate_norm = _gate(config.gate, width)

    def forward(self, y: Tensor, sight: Sight | None = None, keys_values: KeysValues | None = None) -> Tensor:
        """(B, L, d) -> (B, L, d).

        Args:
            sight, keys_values: How the tokens read their pictures, and what it picked of these; None: there are none.
        """
        stream = y.to(self.attention_norm.weight.dtype)
        if sight is not None and keys_values is not None:
            q = self.attention.queries(self.attention_norm(stream))
            pictures = sight.rows  # of generation's beams, several rows look at the same pictures
            attended = sight.attend(q.reshape(pictures, -1, *q.shape[2:]), *keys_values).reshape(q.shape)
            stream = stream + _opened(self.attention_gate_norm) * self.attention.output(attended)
        if self.ffw is not None:
            stream = stream + _opened(self.ffw_gate_norm) * self.ffw(self.ffw_norm(stream))
        return stream.to(y.dtype)


def _gate(kind: str, width: int) -> nn.Parameter | None:
    return None if kind == "none" else nn.Parameter(torch.zeros(width if kind == "vector" else 1))


def _opened(gate: Tensor | None) -> Tensor | float:
    return 1.0 if gate is None else gate.tanh()


# --- a call ----------------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """What the decoder's layers know of the pictures of one call of the model, or of one `generate`.

    Args:
        media: The pictures.
        times: (B, P), the text time of the text that was given; None where that text is unknown, and has no pictures.
        attend: "last" or "all_previous".
        generating: Then forward passes follow each other, and what is made of the pictures is kept for the next.
        start: Place of the first token of `times` in its sequence.
        offset: Place of the first token of the running forward pass.
    """

    media: MediaCache
    times: Tensor | None
    attend: str
    generating: bool = False
    start: int = 0
    offset: int = 0
    _sight: tuple[Any, Sight | None] = (None, None)
    _picked: dict[Any, KeysValues] = field(default_factory=dict)

    def sight(self, y: Tensor) -> Sight | None:
        """How the tokens of a stream (rows, L, d) read their pictures; rows are B or, of beams, a multiple of it."""
        if self.times is None or self.media.latents is None:
            return None
        rows, length, given = y.shape[0], y.shape[1], self.times.shape[1]
        first = self.offset - self.start
        if first >= given:  # behind the given text, where no more markers come, all tokens have the same time
            times, key = self.times[:, -1:].expand(-1, length), ("behind", rows, length, y.device)
        else:
            times, key = self.times[:, first : first + length], (first, rows, length, y.device)
        if self._sight[0] != key:
            if times.shape[1] != length and not (self.generating and self._sight[0] is not None):
                raise ValueError(
                    f"The decoder reads {length} positions where input_ids has {times.shape[1]}: this model puts something "
                    "beside the text, so the markers' places in it are unknown. Use its text model alone."
                )
            self._sight = key, self._look(times, rows, length, y.device)
            self._picked.clear()
        return self._sight[1]

    def _look(self, times: Tensor, rows: int, length: int, device: torch.device) -> Sight | None:
        if times.shape[1] < length:  # without a key-value cache the generated text follows the given one
            times = torch.cat([times, times[:, -1:].expand(-1, length - times.shape[1])], dim=1)
        assert self.media.numbers is not None
        times = times.repeat_interleave(rows // len(times), dim=0).reshape(len(times), -1)
        return look(times.to(device), self.media.numbers.to(device), self.attend)

    def keys_values(self, key: Any, sight: Sight, make: Callable[[Tensor], KeysValues]) -> KeysValues:
        """What the layer `key` reads in this forward pass; made once while the sight is the same."""
        if key not in self._picked:
            self._picked[key] = sight.pick(*self.media.keys_values(key, make))
        return self._picked[key]


class NoMarkers(LogitsProcessor):
    """Gives the marker no probability: text that is written brings no pictures."""

    def __init__(self, marker: int) -> None:
        self.marker = marker

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self.marker < scores.shape[-1]:
            scores = scores.index_fill(-1, torch.tensor(self.marker, device=scores.device), -torch.inf)
        return scores


# --- the layers ------------------------------------------------------------------------------------------------------


class GatedXAttnLayer(MultimodalLayer):
    """Base of everything that this method puts into a model."""


class MediaReader(AttachedPart, GatedXAttnLayer, nn.Module):
    """Hangs below the model: takes the pictures out of each call's inputs and holds what the layers share.

    A call's state is a `Reading` in a scope of the thread, which ends with the call.
    """

    role = ""
    adapter_layer_names = ("gated_xattn_resampler", "gated_xattn_shared")
    gated_xattn_resampler: Any  # {adapter: Resampler}
    gated_xattn_shared: Any  # {adapter: GatedBlock}, of adapters with share_blocks

    def __init__(self, model: nn.Module, stack: nn.Module) -> None:
        nn.Module.__init__(self)
        AttachedPart.__init__(self)
        self.gated_xattn_resampler = nn.ModuleDict()
        self.gated_xattn_shared = nn.ModuleDict()
        self.encoders = nn.ModuleDict()
        self.encoder_of: dict[str, str] = {}
        self.configs: dict[str, GatedXAttnConfig] = {}
        self.scope = CallScope()
        self._model, self._stack = (model,), (stack,)  # tuples are not registered
        names = list(inspect.signature(model.forward).parameters)
        self._ids_argument = names.index("input_ids") if "input_ids" in names else None
        own = set(names)  # a vision-language model's pixel_values are its own
        self._inputs = [n for n in ("pixel_values", "vision_features", "frame_mask", "media") if n not in own]
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
            stack.register_forward_pre_hook(self._before_stack, with_kwargs=True),
        ]
        self._own_generate = model.__dict__.get("generate")
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self.generate

    def host(self) -> nn.Module:
        return self._stack[0]

    def remove_hooks(self) -> None:
        super().remove_hooks()
        self._model[0].__dict__.pop("generate", None)
        if self._own_generate is not None:
            self._model[0].__dict__["generate"] = self._own_generate

    def add(self, adapter_name: str, config: GatedXAttnConfig, width: int, encoder: nn.Module | None) -> None:
        if encoder is not None:
            key = vision_key(config)
            if key not in self.encoders:
                self.encoders[key] = encoder
            self.encoder_of[adapter_name] = key
        self.configs[adapter_name] = config
        self.gated_xattn_resampler[adapter_name] = make_resampler(config)
        if config.share_blocks:
            assert config.vision_hidden_size is not None
            self.gated_xattn_shared[adapter_name] = GatedBlock(config, width, config.vision_hidden_size)
        self.settle(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.encoder_of.pop(adapter_name, None)
        self.configs.pop(adapter_name, None)
        for key in set(self.encoders) - set(self.encoder_of.values()):
            del self.encoders[key]

    def train(self, mode: bool = True) -> MediaReader:
        super().train(mode)
        self.encoders.eval()  # frozen: no dropout, ever
        return self

    # --- around the model's forward and generate ---

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        given = self._take(kwargs)
        adapter = self._acting(given)
        if adapter is None or (self.scope.is_open and self.scope.seen.generating):
            return args, kwargs
        ids = kwargs.get("input_ids")
        if ids is None and self._ids_argument is not None and len(args) > self._ids_argument:
            ids = args[self._ids_argument]
        past = _past_length([*args, *kwargs.values()])
        if past and ids is not None and "media" not in given:
            raise ValueError(
                "A call with past_key_values goes on with a text whose pictures it doesn't know. Pass the same "
                "media=MediaCache() to this and to the calls before."
            )
        if kwargs.get("labels") is not None:  # a marker is never a target, and may lie beyond the vocabulary
            marker = self.configs[adapter].media_token_id
            kwargs["labels"] = kwargs["labels"].masked_fill(kwargs["labels"] == marker, -100)
        reading = self.read(adapter, ids, given, goes_on=past > 0)
        self.scope.open()
        self.scope.seen = reading
        return args, kwargs

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self.scope.is_open and not self.scope.seen.generating:
            self.scope.close()

    def _before_stack(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.scope.is_open and self.scope.seen.generating:
            self.scope.seen.offset = _past_length([*args, *kwargs.values()])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the model's `generate`: pictures are read once, and markers are never written."""
        model: Any = self._model[0]
        own: Any = self._own_generate or type(model).generate.__get__(model)
        given = self._take(kwargs)
        adapter = self._acting(given)
        if adapter is None:
            return own(*args, **kwargs)
        kwargs |= dict(zip(inspect.signature(own).parameters, args, strict=False))
        ids = kwargs.get("input_ids", kwargs.get("inputs"))
        past, mask = _past_length([kwargs.get("past_key_values")]), kwargs.get("attention_mask")
        # As generate takes it: a mask that is longer than the text covers what is in the cache as well.
        goes_on = past > 0 and ids is not None and mask is not None and mask.shape[1] > ids.shape[1]
        if goes_on and "media" not in given:
            raise ValueError(
                "generate goes on with a text whose pictures it doesn't know. Pass the whole text and all of its pictures, "
                "or the same media=MediaCache() as to the calls before."
            )
        marker: Any = self.configs[adapter].media_token_id
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), NoMarkers(marker)])
        with torch.no_grad():
            reading = self.read(adapter, ids, given, goes_on)
        reading.generating, reading.start = True, past if goes_on else 0
        self.scope.open()
        self.scope.seen = reading
        try:
            return own(**kwargs)
        finally:
            self.scope.close()

    def _take(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The pictures among a call's inputs, taken out of them."""
        found = {name: kwargs.pop(name) for name in self._inputs if name in kwargs}
        return {name: value for name, value in found.items() if value is not None}

    def _acting(self, given: dict[str, Any]) -> str | None:
        """The adapter that reads this call's pictures."""
        active = self.live_adapters()
        if not active and given:
            raise ValueError(
                f"{', '.join(given)} reached a model whose GatedXAttn adapter is disabled or not active: nothing would read "
                "it. Leave it out, or enable the adapter."
            )
        if len(active) > 1:
            raise ValueError(f"Adapters {active} would read the same pictures: one GatedXAttn adapter can be active.")
        return active[0] if active else None

    # --- the pictures ---

    def read(self, adapter: str, ids: Tensor | None, given: dict[str, Any], goes_on: bool) -> Reading:
        """The pictures of a call and the places of its text.

        Args:
            ids: (B, L).
            given: Of pixel_values, vision_features, frame_mask and media, those that were passed.
            goes_on: Whether the text follows on one whose pictures are in `media`.

        Raises:
            ValueError: a row has more markers than pictures, or a shape is wrong.
        """
        config = self.configs[adapter]
        media = given.get("media")
        if media is not None and not isinstance(media, MediaCache):
            raise ValueError(f"media must be a MediaCache, got {type(media).__name__}.")
        media = MediaCache() if media is None else media
        pictures = self._pictures(adapter, given)
        if ids is None:
            if pictures is not None or media.latents is not None:
                raise ValueError("Pictures were given without input_ids, in which their markers stand.")
            return Reading(media, None, config.attend)
        if pictures is not None and len(pictures) != len(ids):
            raise ValueError(f"Pictures of {len(pictures)} rows were given for {len(ids)} rows of text.")
        marks, known = ids == config.media_token_id, media.counts(ids)
        if len(known) != len(ids):
            raise ValueError(f"media holds the pictures of {len(known)} rows, the text has {len(ids)}.")
        new = marks.sum(dim=1) - (0 if goes_on else known)
        self._check_counts(new, 0 if pictures is None else pictures.shape[1], known)
        if pictures is not None:
            self._append(media, adapter, pictures, given.get("frame_mask"), new)
        return Reading(media, text_time(marks, known if goes_on else None), config.attend)

    def _check_counts(self, new: Tensor, given: int, known: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        for row, (needed, before) in enumerate(zip(new.tolist(), known.tolist(), strict=True)):
            if needed > given:
                raise ValueError(
                    f"Row {row} has {needed + before} markers but {given + before} pictures: each marker in input_ids "
                    "stands for one picture of pixel_values or vision_features."
                )
            if needed < 0:
                raise ValueError(f"Row {row} has {needed + before} markers, but media holds {before} pictures of it.")

    def _pictures(self, adapter: str, given: dict[str, Any]) -> Tensor | None:
        """Pixels (B, T, F, C, H, W) or features (B, T, F, S, D)."""
        pixels, features = given.get("pixel_values"), given.get("vision_features")
        width = self.configs[adapter].vision_hidden_size
        if pixels is not None and features is not None:
            raise ValueError("pixel_values and vision_features were both given: pictures come in one of them.")
        if pixels is not None:
            if adapter not in self.encoder_of:
                raise ValueError(
                    f"pixel_values were given, but adapter {adapter!r} has no vision_encoder: pass vision_features (B, T, F, "
                    f"S, {width})."
                )
            if pixels.ndim not in (5, 6):
                raise ValueError(
                    f"pixel_values have shape {tuple(pixels.shape)}, not (B, T, C, H, W) of pictures or (B, T, F, C, H, W) of "
                    "videos: T is the number of pictures in a row."
                )
            found = pixels if pixels.ndim == 6 else pixels[:, :, None]
        elif features is None:
            found = None
        elif features.ndim != 5 or features.shape[-1] != width:
            raise ValueError(f"vision_features have shape {tuple(features.shape)}, not (B, T, F, S, {width}).")
        else:
            found = features
        mask = given.get("frame_mask")
        if mask is not None and (found is None or mask.shape != found.shape[:3]):
            shape = None if found is None else tuple(found.shape[:3])
            raise ValueError(f"frame_mask has shape {tuple(mask.shape)}, the frames have (B, T, F) = {shape}.")
        return found

    def _append(
        self, media: MediaCache, adapter: str, pictures: Tensor, frame_mask: Tensor | None, counts: Tensor
    ) -> None:
        """Add to `media` the first `counts` (B) of each row's pictures; the others stand in no text."""
        b = len(counts)
        if torch.compiler.is_compiling():
            latents = self.tokens(adapter, pictures.flatten(0, 1), _flat(frame_mask)).unflatten(0, (b, -1))
        else:
            most = int(counts.max())
            if not most:
                return
            pictures = pictures[:, :most]
            mask = None if frame_mask is None else frame_mask[:, :most]
            own = torch.arange(most, device=counts.device) < counts[:, None]
            if bool(own.all()):
                latents = self.tokens(adapter, pictures.flatten(0, 1), _flat(mask)).unflatten(0, (b, most))
            else:
                own = own.to(pictures.device)
                found = self.tokens(adapter, pictures[own], None if mask is None else mask[own])
                latents = found.new_zeros(b, most, *found.shape[1:])
                latents[own.to(found.device)] = found
        media.append(latents, counts)

    def tokens(self, adapter: str, pictures: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Pixels (N, F, C, H, W) or features (N, F, S, D) of N pictures or videos -> tokens (N, R, D)."""
        resampler: Resampler = self.gated_xattn_resampler[adapter]
        if pictures.ndim == 5:
            pictures = frame_features(self.encoders[self.encoder_of[adapter]], pictures)
        device = resampler.frames.device
        return resampler(pictures.to(device), None if frame_mask is None else frame_mask.to(device).bool())


def make_resampler(config: GatedXAttnConfig) -> Resampler:
    width: Any = config.vision_hidden_size
    if config.resampler != "perceiver":
        return (LinearResampler if config.resampler == "linear" else MeanResampler)(width, config.max_frames)
    sizes = (config.num_latents, config.resampler_depth, config.resampler_heads, config.head_dim)
    return PerceiverResampler(width, config.max_frames, *sizes)


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten(0, 1)


def _past_length(inputs: list[Any]) -> int:
    """How many tokens are in the key-value cache among a call's inputs."""
    return next((int(value.get_seq_length()) for value in inputs if isinstance(value, Cache)), 0)


class SeeingLayer(HostedLayer, GatedXAttnLayer, nn.Module):
    """Wraps a frozen decoder layer with the block before it. What the decoder asks of the layer is the layer's own.

    The block is recomputed with the layer under gradient checkpointing: it gets the pictures' tokens as an input.
    """

    adapter_layer_names = ("gated_xattn_block",)
    gated_xattn_block: Any  # {adapter: GatedBlock}; empty for adapters with share_blocks

    def __init__(self, base_layer: nn.Module, reader: MediaReader, role: str) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.gated_xattn_block = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.sharing: set[str] = set()
        self.role = role
        self._reader = (reader,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def host(self) -> nn.Module:
        return self.base_layer

    def add(self, adapter_name: str, config: GatedXAttnConfig, width: int) -> None:
        if config.share_blocks:
            self.sharing.add(adapter_name)
            return
        assert config.vision_hidden_size is not None
        self.gated_xattn_block[adapter_name] = GatedBlock(config, width, config.vision_hidden_size)
        self.settle(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.sharing.discard(adapter_name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(self.see(hidden_states), *args, **kwargs)

    def see(self, y: Tensor) -> Tensor:
        """(B, L, d) -> (B, L, d), read on by the frozen layer."""
        (reader,) = self._reader
        adapter = next((a for a in reader.live_adapters() if a in self.sharing or a in self.gated_xattn_block), None)
        if adapter is None:
            return y
        if not reader.scope.is_open:
            raise RuntimeError(
                "A decoder layer ran outside of a call of its model, where nothing is known of pictures. Call the model that "
                "the adapter was made for, not a part of it."
            )
        shared = adapter in self.sharing
        block: GatedBlock = reader.gated_xattn_shared[adapter] if shared else self.gated_xattn_block[adapter]
        reading: Reading = reader.scope.seen
        sight = reading.sight(y)
        if sight is None:
            return self._run(block, y)
        make = block.attention.keys_values
        if reading.generating:
            key = adapter if shared else (adapter, self.role)
            return block(y, sight, reading.keys_values(key, sight, lambda m: make(m.to(y.device))))

        def see(y: Tensor, latents: Tensor) -> Tensor:
            return block(y, sight, sight.pick(*make(latents)))

        latents: Any = reading.media.latents
        return self._run(see, y, latents.to(y.device))

    def _run(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and getattr(self.base_layer, "gradient_checkpointing", False):
            return self.base_layer._gradient_checkpointing_func(function, *tensors)
        return function(*tensors)


class MarkerEmbedding(HostedLayer, GatedXAttnLayer, nn.Module):
    """Wraps the frozen token embedding: the marker gets a row of its own, which trains."""

    adapter_layer_names = ("gated_xattn_marker_norm",)
    gated_xattn_marker_norm: Any  # {adapter: (d)}, as the embedding gives it, that is after any scaling

    def __init__(self, base_layer: nn.Module, role: str) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.gated_xattn_marker_norm = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self.markers: dict[str, int] = {}
        self.role = role

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def host(self) -> nn.Module:
        return self.base_layer

    @torch.no_grad()
    def add(self, adapter_name: str, marker: int) -> None:
        """The row starts as the vocabulary's own; one beyond it as the mean of rows that are spread over it."""
        embedding: Any = self.base_layer
        device, size = embedding.weight.device, embedding.num_embeddings
        ids = torch.tensor([marker]) if marker < size else torch.linspace(0, size - 1, min(size, 1024)).long()
        self.markers[adapter_name] = marker
        self.gated_xattn_marker_norm[adapter_name] = nn.Parameter(embedding(ids.to(device)).mean(dim=0))
        self.settle(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.markers.pop(adapter_name, None)

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = next(iter(self.live_adapters()), None)
        if adapter is None:
            return self.base_layer(input_ids, *args, **kwargs)
        marks = input_ids == self.markers[adapter]
        rows = self.base_layer(input_ids.masked_fill(marks, 0), *args, **kwargs)
        return torch.where(marks[..., None], self.gated_xattn_marker_norm[adapter].to(rows.dtype), rows)


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
        ValueError: there is none that reads text alone; the message says why and what to use.
    """
    instead = "Use a decoder-only language model (Llama, Qwen, Gemma, Mistral, OPT, GPT-2, ...)."
    towers = [t for t in found.towers if t.name == "decoder"]
    if not towers:
        raise ValueError(f"GatedXAttn stands before the layers of a decoder; {found.model_class} has none. {instead}")
    root = towers[0].path
    queries = [m for m in found.matrices if m.tower == "decoder" and m.letter in ("q", "qkv")]
    lists = {layer.rpartition(".")[0] for m in queries if (layer := layer_of(m.module))}
    embeddings = [e for e in token_embeddings(model) if is_below(e, root)]
    if len(towers) > 1 or any(t.name == "text" for t in found.towers) or len(lists) != 1 or not embeddings:
        raise ValueError(
            f"{found.model_class} has no single stack of decoder layers that reads the text (an encoder and a decoder, or "
            f"several). GatedXAttn stands before the layers of one decoder. {instead}"
        )
    (stack,) = lists
    modules = own_modules(model)
    layers = [path for path in modules if path.rpartition(".")[0] == stack and path.rpartition(".")[2].isdigit()]
    primary = unwrap(model.get_input_embeddings())
    embedding = next((e for e in embeddings if modules[e] is primary), embeddings[0])
    width: Any = towers[0].hidden_size
    return Decoder(stack.rpartition(".")[0], layers, embedding, width)


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
    not_mergeable = (
        "Gated cross-attention is no weight update, so it can't be merged. Keep the adapter, or get the language model "
        "back by unload()."
    )

    @classmethod
    def match(cls, config: GatedXAttnConfig, model: nn.Module) -> list[Matrix]:
        """The token embedding, and every n-th layer of the decoder."""
        found, model = describe(model), base_model(model)
        decoder = find_decoder(model, found)
        chosen = [(i, path) for i, path in enumerate(decoder.layers) if (i + 1) % config.every_n_layers == 0]
        if not chosen:
            raise ValueError(
                f"every_n_layers={config.every_n_layers}, but the decoder of {found.model_class} has {len(decoder.layers)} "
                "layers."
            )
        embedding: Any = own_modules(model)[decoder.embedding]
        rows, row = embedding.num_embeddings, embedding.embedding_dim
        matrices = [Matrix(decoder.embedding, "marker", (0, row), rows, row, "decoder", "decoder.marker.0")]
        d, d_in = decoder.width, config.vision_hidden_size or 0
        return matrices + [
            Matrix(path, "layer", (0, d), d_in, d, "decoder", f"decoder.layer.{i}") for i, path in chosen
        ]

    def check_model(self, config: GatedXAttnConfig, matrices: list[Matrix], found: Anatomy) -> None:
        if config.has_encoder and "pixel_values" in inspect.signature(self.model.forward).parameters:
            raise ValueError(
                f"{found.model_class} reads pixel_values itself, so vision_encoder= would get none. Leave it out, set "
                "vision_hidden_size=D and pass vision_features (B, T, F, S, D)."
            )
        if not config.has_encoder and config.vision_hidden_size is None:
            raise ValueError(
                "GatedXAttn needs vision_encoder=, the Hub id or folder of a frozen vision encoder, or the width "
                "vision_hidden_size= of features that calls bring as vision_features."
            )
        self._decoder = find_decoder(self.model, found)
        present = self.reader()
        self._encoder = load_vision_encoder(config, None if present is None else present.encoders)
        if self._encoder is not None:
            follow(self._encoder, self.model.get_submodule(matrices[1].module), keep_dtype=config._given is not None)

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
            reader.add(adapter_name, peft_config, self._decoder.width, self._encoder)
            self._freeze_unless_active(reader, adapter_name)
        (matrix,) = self._matched[current_key]
        layer: Any = target
        if not isinstance(target, GatedXAttnLayer):
            if matrix.letter == "marker":
                layer = MarkerEmbedding(target, matrix.role)
            else:
                layer = SeeingLayer(target, reader, matrix.role)
            layer.train(target.training)
        if matrix.letter == "marker":
            layer.add(adapter_name, peft_config.media_token_id)
        else:
            layer.add(adapter_name, peft_config, self._decoder.width)
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


register("gated_xattn", GatedXAttnConfig, GatedXAttnModel)
