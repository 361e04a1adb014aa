"""Which images a text reads: its markers, the images of a batch, and attention to those alone.

With mark[b, i] = 1 where token i is the marker of an image, the text time of a token is

    t[b, i] = sum_{k <= i} mark[b, k]                       a marker already sees its own image

    allow[b, i, j] = (t[b, i] == j)                         attend = "last": the last image before the token
                     (t[b, i] >= j)                         attend = "all_previous"

for the images j = 1..T. Where nothing is allowed (t = 0) the attention's output is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .perceiver import KeysValues


def text_time(marks: Tensor, before: Tensor | None = None) -> Tensor:
    """t (B, L) of markers (B, L), counted on from those `before` (B)."""
    times = marks.long().cumsum(dim=1)
    return times if before is None else times + before[:, None]


class MediaCache:
    """The images of a batch of conversations, kept from turn to turn as `past_key_values` keeps their text.

    Each call adds the images that it is given; their tokens, and the keys and values of every layer, are made once.
    A cache belongs to one adapter.

    Attributes:
        latents: (B, T, R, D), or None before the first image.
        numbers: (B, T), the number j >= 1 of each image in its conversation; 0 where a row has none in this place.
        adapter: The adapter that has read the images; to another they would mean nothing.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoImageProcessor, AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> tokenizer.pad_token = tokenizer.eos_token
        >>> processor = InterleavedProcessor(tokenizer, AutoImageProcessor.from_pretrained("facebook/dinov2-small"))
        >>> config = GatedXAttnConfig(vision_encoder="facebook/dinov2-small", media_token_id=processor.media_token_id)
        >>> model = get_peft_model(lm, config).eval()
        >>> media = MediaCache()
        >>> out = model(**processor(["<image>a red"], images=[[apple]]), media=media, use_cache=True)
        >>> media.latents.shape
    """

    adapter: str | None = None

    def __init__(self) -> None:
        self.latents: Tensor | None = None
        self.numbers: Tensor | None = None
        self._kept: dict[Any, KeysValues] = {}

    def counts(self, rows: Tensor) -> Tensor:
        """(B): how many images each row has. `rows` is any tensor of B rows on the right device."""
        return rows.new_zeros(len(rows)) if self.numbers is None else self.numbers.amax(dim=1).to(rows)

    def append(self, latents: Tensor, counts: Tensor) -> None:
        """Add images.

        Args:
            latents: (B, T, R, D).
            counts: (B), how many of a row's T are its own; they come first.
        """
        place = torch.arange(1, latents.shape[1] + 1, device=counts.device)
        numbers = torch.where(place <= counts[:, None], place + self.counts(counts)[:, None], 0)
        if self.latents is None or self.numbers is None:
            self.latents, self.numbers = latents, numbers
        else:
            self.latents = torch.cat([self.latents, latents], dim=1)
            self.numbers = torch.cat([self.numbers, numbers], dim=1)

    @property
    def places(self) -> int:
        """T."""
        return 0 if self.latents is None else self.latents.shape[1]

    def cut(self, places: int) -> None:
        """Forget all but the first `places` of the T."""
        if not places:
            self.latents, self.numbers, self._kept = None, None, {}
        elif self.latents is not None and self.numbers is not None:
            self.latents, self.numbers = self.latents[:, :places], self.numbers[:, :places]
            self._kept = {key: (k[:, :places], v[:, :places]) for key, (k, v) in self._kept.items()}

    def repeat_interleave(self, times: int) -> MediaCache:
        """For several continuations of each row, such as answers that are compared: a cache whose rows are repeated.

        `past_key_values.batch_repeat_interleave(times)` does the same to the text's.
        """

        def repeated(*tensors: Tensor) -> Any:
            return tuple(x.repeat_interleave(times, dim=0) for x in tensors)

        cache = MediaCache()
        cache.adapter = self.adapter
        if self.latents is not None and self.numbers is not None:
            cache.latents, cache.numbers = repeated(self.latents, self.numbers)
        cache._kept = {key: repeated(*keys_values) for key, keys_values in self._kept.items()}
        return cache

    def keys_values(self, key: Any, make: Callable[[Tensor], KeysValues]) -> KeysValues:
        """Those of all images, each (B, T, R, heads, d_h); `make` is called for images that are new to `key`."""
        assert self.latents is not None
        kept = self._kept.get(key)
        known = 0 if kept is None else kept[0].shape[1]
        if known < self.latents.shape[1]:
            k, v = make(self.latents[:, known:])
            if kept is not None:
                k, v = torch.cat([kept[0], k], dim=1), torch.cat([kept[1], v], dim=1)
            self._kept[key] = (k, v)
        return self._kept[key]


# --- attention to images ---------------------------------------------------------------------------------------------


class Sight:
    """Base of the ways in which the tokens of one forward pass read their images.

    Args:
        seen: (B, L), the tokens that see an image at all.
    """

    def __init__(self, seen: Tensor) -> None:
        self.rows = len(seen)  # B
        self.unseen = ~seen[..., None, None]

    def pick(self, k: Tensor, v: Tensor) -> KeysValues:
        """What is read of all images' keys and values, each (B, T, R, h, d_h); worth keeping while this object is."""
        raise NotImplementedError

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (B, L, h, d_h) and what `pick` gave -> (B, L, h, d_h), exactly 0 where a token sees nothing."""
        raise NotImplementedError


class OneImage(Sight):
    """Every row has one image in view.

    Args:
        seen: (B, L).
        places: (B), where it stands among the row's T.
    """

    def __init__(self, seen: Tensor, places: Tensor) -> None:
        super().__init__(seen)
        self.places = places

    def pick(self, k: Tensor, v: Tensor) -> KeysValues:
        if k.shape[1] == 1:
            return _heads_first(k[:, 0]), _heads_first(v[:, 0])
        rows = torch.arange(len(k), device=k.device)
        return _heads_first(k[rows, self.places]), _heads_first(v[rows, self.places])

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(_heads_first(q), k, v)
        return _heads_first(out).masked_fill(self.unseen, 0.0)


class ManyImages(Sight):
    """Every token is scored against all images, and a mask leaves those that it sees.

    Args:
        allow: (B, L, T).
    """

    def __init__(self, allow: Tensor) -> None:
        super().__init__(allow.any(dim=-1))
        self.allow = allow | self.unseen[..., 0]  # a row of the softmax without an entry would be NaN

    def pick(self, k: Tensor, v: Tensor) -> KeysValues:
        return _heads_first(k.flatten(1, 2)), _heads_first(v.flatten(1, 2))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.allow.repeat_interleave(k.shape[2] // self.allow.shape[-1], dim=-1)[:, None]
        out = F.scaled_dot_product_attention(_heads_first(q), k, v, mask)
        return _heads_first(out).masked_fill(self.unseen, 0.0)


class Segments(Sight):
    """Each run of tokens that see the same image is scored against that image alone.

    The N runs are laid side by side, padded to the longest: N x longest x R scores instead of B x L x T R.

    Args:
        seen: (B, L).
        images: (N), the image of each run: row * T + place.
        tokens: (N, longest), the token in each place: row * L + i; any where the run is shorter.
        back: (B, L), where each token stands in `tokens`, flat; any where it sees nothing.
        all_in_order: Whether `images` is 0, 1, ..., B T - 1.
    """

    def __init__(self, seen: Tensor, images: Tensor, tokens: Tensor, back: Tensor, all_in_order: bool) -> None:
        super().__init__(seen)
        self.images, self.tokens, self.back, self.all_in_order = images, tokens, back, all_in_order

    def pick(self, k: Tensor, v: Tensor) -> KeysValues:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        if not self.all_in_order:
            k, v = k.index_select(0, self.images), v.index_select(0, self.images)
        return _heads_first(k), _heads_first(v)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.flatten(0, 1).index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape)
        out = _heads_first(F.scaled_dot_product_attention(_heads_first(q), k, v))
        out = out.flatten(0, 1).index_select(0, self.back.flatten()).unflatten(0, self.back.shape)
        return out.masked_fill(self.unseen, 0.0)


def _heads_first(x: Tensor) -> Tensor:
    """(N, L, h, d_h) <-> (N, h, L, d_h)."""
    return x.transpose(1, 2)


def sight_of(times: Tensor, numbers: Tensor, attend: str) -> Sight | None:
    """How the tokens of a forward pass read their images in the cheapest way; None if no token sees one.

    Args:
        times: (B, L), their text time.
        numbers: (B, T), of the images, as `MediaCache` keeps them.
        attend: "last" or "all_previous".
    """
    one, compiling = numbers.shape[1] == 1, torch.compiler.is_compiling()
    if not compiling:  # a graph may not depend on values
        if not bool(times.any()):
            return None
        one = one or (attend == "last" and bool((times == times[:, :1]).all()))
    if one:
        place = (numbers == times[:, -1:].clamp_min(1)).long().argmax(dim=1)
        return OneImage(times > 0, place)
    allow = allowed(times, numbers, attend)
    if compiling or attend != "last":
        return ManyImages(allow)
    segments = _segments(allow)
    # Laying tokens side by side costs passes over them: it pays where it halves the scores at least.
    return segments if 2 * segments.tokens.numel() <= allow.numel() else ManyImages(allow)


def allowed(times: Tensor, numbers: Tensor, attend: str) -> Tensor:
    t, j = times[..., None], numbers[:, None]
    return (j > 0) & ((t == j) if attend == "last" else (t >= j))


def _segments(allow: Tensor) -> Segments:
    b, length, t = allow.shape
    seen = allow.any(dim=-1)
    images = torch.arange(b, device=allow.device)[:, None] * t + allow.long().argmax(dim=-1)
    tokens = seen.flatten().nonzero().flatten()
    read, run, lengths = torch.unique_consecutive(images.flatten()[tokens], return_inverse=True, return_counts=True)
    longest = int(lengths.max())
    first = lengths.cumsum(0) - lengths
    place = run * longest + torch.arange(len(tokens), device=allow.device) - first[run]
    laid = tokens.new_zeros(len(read), longest)
    laid.view(-1)[place] = tokens
    back = tokens.new_zeros(b, length)
    back.view(-1)[tokens] = place
    in_order = len(read) == b * t and bool((read == torch.arange(b * t, device=read.device)).all())
    return Segments(seen, read, laid, back, in_order)


# --- a call ----------------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """What the decoder's layers know of the images of one call of the model, or of one `generate`.

    Args:
        media: The images.
        times: (B, P), the text time of the call's text; None where that text is unknown, and has no images.
        attend: "last" or "all_previous".
        generating: Whether forward passes follow each other.
        keeps: Whether what is made of the images is kept for later forward passes, in this call or with this `media`.
        start: Place of the first token of `times` in its sequence.
        offset: Place of the first token of the running forward pass.
        known: How many places `media` had before the call.
    """

    media: MediaCache
    times: Tensor | None
    attend: str
    generating: bool = False
    keeps: bool = False
    start: int = 0
    offset: int = 0
    known: int = 0
    is_missed: bool = False  # whether a layer has found that there are no images
    _sight: tuple[Any, Sight | None] = (None, None)
    _picked: dict[Any, KeysValues] = field(default_factory=dict)

    def undo(self) -> None:
        """After a call that failed: its images are taken out of `media`, so that it can be made again."""
        self.media.cut(self.known)

    def sight(self, y: Tensor) -> Sight | None:
        """How the tokens of a stream (rows, L, d) read their images; rows are B or, of beams, a multiple of it."""
        if self.times is None or self.media.latents is None:
            return None
        rows, length, known = y.shape[0], y.shape[1], self.times.shape[1]
        first = self.offset - self.start
        if first >= known:  # behind the call's text, where no more markers come, all tokens have the same time
            times, first = self.times[:, -1:].expand(-1, length), known
        else:
            times = self.times[:, first : first + length]
        key = (first, rows, length, y.device)
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
        if times.shape[1] < length:  # without a key-value cache the generated text follows the call's
            times = torch.cat([times, times[:, -1:].expand(-1, length - times.shape[1])], dim=1)
        assert self.media.numbers is not None
        times = times.repeat_interleave(rows // len(times), dim=0).reshape(len(times), -1)
        return sight_of(times.to(device), self.media.numbers.to(device), self.attend)

    def keys_values(self, key: Any, sight: Sight, make: Callable[[Tensor], KeysValues]) -> KeysValues:
        """What the layer `key` reads in this forward pass; made once while the sight is the same."""
        if key not in self._picked:
            self._picked[key] = sight.pick(*self.media.keys_values(key, make))
        return self._picked[key]
