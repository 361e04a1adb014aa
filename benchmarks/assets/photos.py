"""Cut-out photos and drawings with captions, in the folders that the painting program Tux Paint offers as stamps.

`photos()` has one row per stamp, letters of alphabets and mirrored doubles left out:

| column | content |
| --- | --- |
| `image` | 168 x 168 RGB image in the middle of white |
| `caption_en` | a sentence, such as `A blue gnu.`; not unique |
| `category`, `subcategory` | the folders: `animals`, and below it `mammals/bovines` or nothing |
| `name` | the file's name, `gnu-stand` |
| `kind` | `photo`, or `drawing`: vector graphics and what lies in folders of cartoons |
| `family` | images whose captions differ in number, colour and the like alone share it |

There is no split: it depends on what is asked.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from rich.progress import track

from .fetch import CONSOLE, Package, build_once, fetch
from .images import as_png, family_of

SIZE = 168
"""Pixels a side of the stored images: 12 x 12 patches of 14."""
STAMPS = Package(
    "apt",
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    megabytes=161,
    licence="GPL-2",
    keep=("./usr/share/tuxpaint/stamps/",),
)
FEATURES = datasets.Features(
    {"image": datasets.Image()}
    | {name: datasets.Value("string") for name in ("caption_en", "category", "subcategory", "name", "kind", "family")}
)


def photos() -> datasets.Dataset:
    """Cut-out photos and drawings with captions, by category; columns as in the module's docstring."""
    return datasets.load_from_disk(str(build_once("photos-1", _build)), keep_in_memory=True)


def _build(folder: Path) -> None:
    root = fetch(STAMPS) / STAMPS.keep[0]
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    files = sorted(path for path in root.rglob("*") if path.suffix in {".png", ".svg"})
    for file in track(files, "Drawing stamps", console=CONSOLE):
        category, *below = file.relative_to(root).parts[:-1]
        words = file.with_suffix(".txt")
        if not words.is_file() or "alphabets" in below:
            continue
        caption = words.read_text("utf-8").splitlines()[0].strip()
        row = {
            "image": {"bytes": as_png(in_the_middle(opened(file))), "path": None},
            "caption_en": caption,
            "category": category,
            "subcategory": "/".join(part for part in below if part != "cartoon"),
            "name": file.stem,
            "kind": "drawing" if file.suffix == ".svg" or "cartoon" in below else "photo",
            "family": family_of_caption(caption),
        }
        for name, value in row.items():
            columns[name].append(value)
    datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(str(folder))


def opened(file: Path) -> Image.Image:
    """The image file, vector graphics drawn large enough."""
    if file.suffix != ".svg":
        return Image.open(file)
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(file), dpi=96, width=2 * SIZE))))


def in_the_middle(image: Image.Image) -> Image.Image:
    """The image's visible part in the middle of a white square, `SIZE` pixels a side, its proportions kept."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    side = max(image.size)
    ground = Image.new("RGBA", (side, side), "white")
    ground.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return ground.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def family_of_caption(caption: str) -> str:
    """`family_of` the caption without its article and what follows the first sentence: "A rose." is "rose"."""
    first = re.split(r"[.!?](?:\s|$)", caption, maxsplit=1)[0]
    return family_of(re.sub(r"^(?:an?|the)\s+", "", first, flags=re.IGNORECASE)).lower()
