"""The images of one call: what was passed, whether it fits the text, and which of it is read.

A reader takes them out of the call's arguments, and makes of them and the text what the decoder's layers read:

    inputs = MediaInputs.take(kwargs, names)        # kwargs keep what the model itself reads
    reading = inputs.read(ids, ...)
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .media import MediaCache, Reading, text_time

NAMES = ("pixel_values", "vision_features", "frame_mask", "media")

Encode = Callable[[Tensor, Tensor | None], Tensor]
"""Pixels (N, F, C, H, W) or features (N, F, S, D), and the frames that are one (N, F) or None -> tokens (N, R, D)."""


@dataclass
class Seeing:
    """How an adapter reads images.

    Args:
        marker: Id of the token that stands for an image.
        attend: "last" or "all_previous".
        vision_width: D.
        identity: By it a `MediaCache` knows the adapter, whatever the adapter is called.
    """

    marker: int
    attend: str
    vision_width: int
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class MediaInputs:
    """What a call brings beside its text; None where it wasn't passed.

    Args:
        pixel_values: Images (B, T, C, H, W) or videos (B, T, F, C, H, W).
        vision_features: (B, T, F, S, D), in their place.
        frame_mask: (B, T, F), True where a frame is one.
        media: The images of earlier calls.
    """

    pixel_values: Tensor | None = None
    vision_features: Tensor | None = None
    frame_mask: Tensor | None = None
    media: MediaCache | None = None

    @classmethod
    def take(cls, kwargs: dict[str, Any], names: Collection[str]) -> MediaInputs:
        """Those of a call's arguments, taken out of them."""
        return cls(**{name: kwargs.pop(name) for name in names if name in kwargs})

    def passed(self) -> list[str]:
        """Names of those that were passed."""
        return [name for name in NAMES if getattr(self, name) is not None]

    def images(self, adapter: str, width: int, has_encoder: bool) -> Tensor | None:
        """Pixels (B, T, F, C, H, W) or features (B, T, F, S, D)."""
        pixels, features, mask = self.pixel_values, self.vision_features, self.frame_mask
        if pixels is not None and features is not None:
            raise ValueError("pixel_values and vision_features were both given: images come in one of them.")
        if pixels is not None and not has_encoder:
            raise ValueError(
                f"pixel_values were given, but adapter {adapter!r} has no vision_encoder: pass vision_features (B, T, F, "
                f"S, {width})."
            )
        if pixels is not None and pixels.ndim not in (5, 6):
            raise ValueError(
                f"pixel_values have shape {tuple(pixels.shape)}, not (B, T, C, H, W) of images or (B, T, F, C, H, W) of "
                "videos: T is the number of images in a row."
            )
        if features is not None and (features.ndim != 5 or features.shape[-1] != width):
            raise ValueError(f"vision_features have shape {tuple(features.shape)}, not (B, T, F, S, {width}).")
        images = pixels[:, :, None] if pixels is not None and pixels.ndim == 5 else pixels
        images = features if images is None else images
        if mask is not None and (images is None or mask.shape != images.shape[:3]):
            shape = None if images is None else tuple(images.shape[:3])
            raise ValueError(f"frame_mask has shape {tuple(mask.shape)}, the frames have (B, T, F) = {shape}.")
        return images

    def cache(self, adapter: str, seeing: Seeing) -> MediaCache:
        """That of earlier calls, or a new one."""
        media = MediaCache() if self.media is None else self.media
        if not isinstance(media, MediaCache):
            raise ValueError(f"media must be a MediaCache, got {type(media).__name__}.")
        if media.places and media.adapter not in (None, seeing.identity):
            raise ValueError(
                f"media holds images as another adapter than {adapter!r} has read them. Take one MediaCache for each "
                "adapter, and give it the images."
            )
        return media

    def read(
        self,
        ids: Tensor | None,
        adapter: str,
        seeing: Seeing,
        encode: Encode,
        has_encoder: bool,
        model: Any,
        goes_on: bool,
    ) -> Reading:
        """The images of a call and the places of its text.

        Args:
            ids: (B, L).
            adapter, seeing: The adapter that reads them, and how.
            encode: Makes tokens of images.
            has_encoder: Whether it takes pixels.
            model: Its embedding says which ids there are.
            goes_on: Whether the text follows on one whose images are in `media`.

        Raises:
            ValueError: a row has more markers than images, no row has a marker though there are images, an id is
                neither the marker nor in the vocabulary, a shape is wrong, or `media` is another adapter's.
        """
        media = self.cache(adapter, seeing)
        known_places = media.places
        images = self.images(adapter, seeing.vision_width, has_encoder)
        if ids is None:
            if images is not None or media.latents is not None:
                raise ValueError("Images were given without input_ids, in which their markers stand.")
            return Reading(media, None, seeing.attend)
        if images is not None and len(images) != len(ids):
            raise ValueError(f"Images of {len(images)} rows were given for {len(ids)} rows of text.")
        marks: Any = ids == seeing.marker
        if not torch.compiler.is_compiling() and ids.numel():  # embeddings may stand in for ids
            self._check_markers(seeing.marker, ids, marks, model)
        known = media.counts(ids)
        if len(known) != len(ids):
            raise ValueError(f"media holds the images of {len(known)} rows, the text has {len(ids)}.")
        new = marks.sum(dim=1) - (0 if goes_on else known)
        if not torch.compiler.is_compiling():
            _check_counts(new, 0 if images is None else images.shape[1], known)
        if images is not None and (latents := _first_of_each_row(images, self.frame_mask, new, encode)) is not None:
            media.append(latents, new)
            media.adapter = seeing.identity
        keeps = self.media is not None and not torch.is_grad_enabled()
        times = text_time(marks, known if goes_on else None)
        return Reading(media, times, seeing.attend, keeps=keeps, known=known_places)

    def _check_markers(self, marker: int, ids: Tensor, marks: Tensor, model: Any) -> None:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
        largest = int(ids.masked_fill(marks, 0).max())
        if size is not None and largest >= size:
            raise ValueError(
                f"input_ids hold {largest}, but the embedding of {type(model).__name__} has {size} rows and the marker is "
                f"media_token_id={marker}. If {largest} is the tokenizer's marker, set media_token_id={largest} "
                "(InterleavedProcessor.media_token_id tells it); if not, the tokenizer isn't this model's."
            )
        images = [name for name in ("pixel_values", "vision_features") if name in self.passed()]
        if images and not bool(marks.any()):
            raise ValueError(
                f"{images[0]} hold images, but no row of input_ids has their marker, media_token_id={marker}: nothing would "
                "read them. InterleavedProcessor.media_token stands in the text for each image; without images leave "
                f"{images[0]} out."
            )


def _check_counts(new: Tensor, passed: int, known: Tensor) -> None:
    for row, (needed, before) in enumerate(zip(new.tolist(), known.tolist(), strict=True)):
        if needed > passed:
            raise ValueError(
                f"Row {row} has {needed + before} markers but {passed + before} images: each marker in input_ids "
                "stands for one image of pixel_values or vision_features."
            )
        if needed < 0:
            raise ValueError(f"Row {row} has {needed + before} markers, but media holds {before} images of it.")


def _first_of_each_row(images: Tensor, mask: Tensor | None, counts: Tensor, encode: Encode) -> Tensor | None:
    """Tokens (B, T, R, D) of the first `counts` (B) images of each row; the others stand in no text and stay zeros."""
    b = len(counts)
    if not torch.compiler.is_compiling():
        most = int(counts.max())
        if not most:
            return None
        images, mask = images[:, :most], None if mask is None else mask[:, :most]
        read = torch.arange(most, device=counts.device) < counts[:, None]
        if not bool(read.all()):
            read = read.to(images.device)
            tokens = encode(images[read], None if mask is None else mask[read])
            latents = tokens.new_zeros(b, most, *tokens.shape[1:])
            latents[read.to(tokens.device)] = tokens
            return latents
    return encode(images.flatten(0, 1), None if mask is None else mask.flatten(0, 1)).unflatten(0, (b, -1))
