"""Short animations of emoji, split like the images.

`animated_emoji()` has one row per concept of `emoji_images()` that is animated: `concept`, `family`, `frames` (eight
84 x 84 RGB images on white, evenly spaced in the animation), `label_en`, `label_zh`, `group`, `subgroup`, `split`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from rich.progress import track

from .fetch import CONSOLE, Package, build_once, fetch
from .images import FEATURES, NEW_STYLE, as_png, bare, emoji_images, images_by_code, on_white

ANIMATIONS = Package(
    "npm",
    "@lobehub/fluent-emoji-anim-1",
    "1.0.0",
    "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    megabytes=165,
    licence="MIT",
    keep=("package/assets/",),
)
FRAMES = 8
COLUMNS = ("concept", "family", "label_en", "label_zh", "group", "subgroup", "split")


def animated_emoji() -> datasets.Dataset:
    """Eight frames of each animated emoji; columns as in the module's docstring."""
    return datasets.load_from_disk(str(build_once("animated-emoji-2", _build)), keep_in_memory=True)


def _build(folder: Path) -> None:
    files = images_by_code(fetch(ANIMATIONS))
    columns: dict[str, list[Any]] = {name: [] for name in ("frames", *COLUMNS)}
    rows = emoji_images().select_columns(["style", *COLUMNS])
    for row in track(rows, "Drawing animations", total=len(rows), console=CONSOLE):
        if row["style"] != NEW_STYLE or bare(row["concept"]) not in files:
            continue
        frames = evenly_spaced(files[bare(row["concept"])])
        if frames is not None:
            columns["frames"].append([{"bytes": as_png(frame), "path": None} for frame in frames])
            for name in COLUMNS:
                columns[name].append(row[name])
    features = datasets.Features(
        {"frames": datasets.List(datasets.Image())} | {name: FEATURES[name] for name in COLUMNS}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))


def evenly_spaced(file: Path) -> list[Image.Image] | None:
    """`FRAMES` frames spread over the loop from its first frame on, or None for a file with fewer."""
    with Image.open(file) as animation:
        total = getattr(animation, "n_frames", 1)
        if total < FRAMES:
            return None
        frames = []
        for index in range(FRAMES):
            animation.seek(index * total // FRAMES)
            frames.append(on_white(animation))
        return frames
