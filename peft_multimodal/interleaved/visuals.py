"""The images and videos of a batch of texts as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images import is_image, read_image
from ..rows import each

Visual = Any  # an image as `read_image` takes it, or a sequence of them: the frames of a video


def images_of_texts(images: Any, texts: Sequence[str], media_token: str) -> list[Sequence[Visual]]:
    """The images of each text, checked against its markers."""
    wrong = "images holds a list of images for each text: images=[[apple, pear], [plum]]."
    if is_image(images):
        raise TypeError(wrong)
    rows = [() if row is None else row for row in images]
    if len(rows) != len(texts):
        raise ValueError(f"{len(rows)} lists of images for {len(texts)} texts.")

    def check(pair: tuple[str, Any], name: str) -> None:
        text, row = pair
        if is_image(row):
            raise TypeError(f"{name}: {wrong}")
        if (markers := text.count(media_token)) != len(row):
            raise ValueError(f"{name} has {markers} markers {media_token!r} but {len(row)} images.")

    each(list(zip(texts, rows, strict=True)), check)
    return rows


def left_by_truncation(
    images: Sequence[Sequence[Visual]], input_ids: Any, marker: int, side: str
) -> list[list[Visual]]:
    """The images whose markers are still in the text, which was cut on this side."""
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    if len(rows) != len(images):
        raise ValueError(f"The tokenizer made {len(rows)} rows of {len(images)} texts: whose images are whose?")
    counts = [row.count(marker) for row in rows]
    return [
        list(row)[len(row) - n :] if side == "left" else list(row)[:n] for row, n in zip(images, counts, strict=True)
    ]


def pixel_batch(image_processor: Any, rows: Sequence[Sequence[Visual]]) -> dict[str, Tensor]:
    """pixel_values (B, T, C, H, W), or with a video among them (B, T, F, C, H, W) and frame_mask (B, T, F)."""
    if image_processor is None:
        raise ValueError("This InterleavedProcessor has no image_processor.")
    visuals = each(rows, _frames)
    frames = [frame for row in visuals for video in row for frame in video]
    pixels = image_processor(frames, return_tensors="pt")["pixel_values"]
    size = (len(visuals), max(map(len, visuals)), max(len(video) for row in visuals for video in row))
    batch = pixels.new_zeros(*size, *pixels.shape[1:])
    mask = torch.zeros(size, dtype=torch.bool)
    for b, row in enumerate(visuals):
        for t, video in enumerate(row):
            mask[b, t, : len(video)] = True
    batch[mask] = pixels  # frames stand in the order of rows, images and frames
    if not any(_is_video(v) for row in rows for v in row):
        return {"pixel_values": batch[:, :, 0]}
    return {"pixel_values": batch, "frame_mask": mask}


def _is_video(visual: Visual) -> bool:
    return isinstance(visual, (Sequence, np.ndarray, Tensor)) and not is_image(visual)


def _frames(row: Sequence[Visual], name: str) -> list[list[Any]]:
    """The frames of each of a text's images and videos; an image has one."""
    videos = []
    for i, visual in enumerate(row):
        frames = list(visual) if _is_video(visual) else [visual]
        if not frames:
            raise ValueError(f"{name}: video {i} has no frames.")
        videos.append([read_image(frame, f"{name}: image {i}") for frame in frames])
    return videos
