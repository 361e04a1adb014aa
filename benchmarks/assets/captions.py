"""Images with what is said of them, in five kinds, for a language model that is to see.

`captions(kind)` are the captions of one of `KINDS`, and `patch_states(kind)` the images as DINOv2-S sees them:

| kind | image | said |
| --- | --- | --- |
| `names` | emoji, three styles | the English name |
| `keywords` | the same | some of the keywords, in any order |
| `sentences` | cut-out photos and drawings | the caption's first sentence |
| `questions` | one coloured shape | a question for its colour, its shape, or whether it is there; the answer |
| `animations` | animated emoji, eight frames | the English name |

A concept, or a family of photos, lies in one split; questions lie in the splits of easy-VQA. Photos that would train but
for their sentence naming a validation or test concept are split `text`: to be read, not to be seen.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from .animated_emoji import FRAMES, animated_emoji
from .easy_vqa import easy_vqa
from .english_clip import image_processor
from .fetch import CONSOLE, build_once
from .images import SIZE, emoji_images, split_families
from .photos import photos
from .towers import dinov2_small

KINDS = ("names", "keywords", "sentences", "questions", "animations")
QUESTIONED = {"train": 1500, "validation": 200, "test": 300}
"""So many of easy-VQA's images are used, drawn by a seed."""
TEST_PHOTOS, VALIDATION_PHOTOS, LARGEST_FAMILY = 120, 60, 10
SPLIT_SEED = 0


@dataclass(frozen=True)
class Caption:
    """What is said of one image."""

    image: int
    """Its row of `patch_states`."""
    answer: str
    split: str
    topic: str
    """Images of one topic are alike: a subgroup of emoji, a folder of photos."""
    thing: str
    """What is shown: a concept, a family of photos, an image of a shape."""
    question: str = ""
    words: tuple[str, ...] = ()
    """Keywords, of which `answer` has all."""

    def said(self, rng: random.Random) -> str:
        """The answer; of keywords one to four, drawn."""
        if not self.words:
            return self.answer
        return ", ".join(rng.sample(self.words, min(len(self.words), rng.randint(1, 4))))


@cache
def captions(kind: str) -> tuple[Caption, ...]:
    """The captions of a kind, as in the module's docstring."""
    datasets.disable_progress_bars()
    return tuple(_CAPTIONS[kind]())


def _emoji_captions(keywords: bool) -> Iterator[Caption]:
    rows = emoji_images().remove_columns("image")
    for index, row in enumerate(rows):
        words = tuple(row["tags_en"]) if keywords else ()
        answer = ", ".join(words) if keywords else row["label_en"]
        if answer:
            yield Caption(index, answer, row["split"], row["subgroup"], row["concept"], words=words)


def _sentences() -> Iterator[Caption]:
    rows = photos().remove_columns("image")
    split = split_families(rows["family"], TEST_PHOTOS, VALIDATION_PHOTOS, LARGEST_FAMILY, SPLIT_SEED)
    unseen = sorted({re.escape(c.answer.lower()) for c in captions("names") if c.split != "train"})
    named = re.compile(rf"\b(?:{'|'.join(unseen)})s?\b")
    for row in rows:
        if split[row["family"]] == "train" and named.search(row["caption_en"].lower()):
            split[row["family"]] = "text"
    for index, row in enumerate(rows):
        topic = f"{row['category']}/{row['subcategory']}".rstrip("/")
        first = re.split(r"(?<=[.!?])\s", row["caption_en"], maxsplit=1)[0]
        yield Caption(index, first, split[row["family"]], topic, row["family"])


def _questions() -> Iterator[Caption]:
    places = {image: index for index, image in enumerate(_questioned_images())}
    rows = easy_vqa().remove_columns("image")
    for row in rows:
        if row["image_id"] in places:
            yield Caption(
                places[row["image_id"]],
                row["answer"],
                row["split"],
                kind_of_question(row["question"], row["answer"]),
                row["image_id"],
                row["question"],
            )


def kind_of_question(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes or no"
    return "colour" if "color" in question else "shape"


def _animations() -> Iterator[Caption]:
    for index, row in enumerate(animated_emoji().remove_columns("frames")):
        yield Caption(index, row["label_en"], row["split"], row["subgroup"], row["concept"])


_CAPTIONS: dict[str, Callable[[], Iterable[Caption]]] = {
    "names": lambda: _emoji_captions(keywords=False),
    "keywords": lambda: _emoji_captions(keywords=True),
    "sentences": _sentences,
    "questions": _questions,
    "animations": _animations,
}


@cache
def _questioned_images() -> list[str]:
    images: dict[str, list[str]] = defaultdict(list)
    rows = easy_vqa()
    for image, split in dict.fromkeys(zip(rows["image_id"], rows["split"], strict=True)):
        images[split].append(image)
    rng = random.Random(SPLIT_SEED)
    return [p for split, size in QUESTIONED.items() for p in rng.sample(sorted(images[split]), size)]


# --- the images ------------------------------------------------------------------------------------------------------


@cache
def patch_states(kind: str) -> Tensor:
    """What the frozen DINOv2-S makes of the images, each channel standardised: `(images, frames, 37, 384)`.

    Frames are 1 but for animations. The tokens are the class token and the patches of an image of 84 x 84. More than
    half of a token is the same in all images, so mean and standard deviation of the named training images are taken
    out of all kinds.
    """
    mean, deviation = _channels()
    return (_kept_states(kind) - mean) / deviation


@cache
def _channels() -> tuple[Tensor, Tensor]:
    """(384), (384)."""
    shown = sorted({caption.image for caption in captions("names") if caption.split == "train"})
    tokens = _kept_states("names")[shown].flatten(0, 2)
    return tokens.mean(dim=0), tokens.std(dim=0)


def _kept_states(kind: str) -> Tensor:
    """As DINOv2-S gives them, computed once and for all."""
    images, frames, each = _IMAGES[kind]

    def build(folder: Path) -> None:
        save_file({"states": seen(list(each())).unflatten(0, (-1, frames))}, folder / "states.safetensors")

    return load_file(build_once(f"dinov2-small-1-{images}", build) / "states.safetensors")["states"]


def image(kind: str, index: int) -> Image.Image:
    """The image of a row of `patch_states`, of an animation the first frame."""
    if kind == "questions":
        return easy_vqa()[_first_questions()[_questioned_images()[index]]]["image"]
    if kind == "animations":
        return animated_emoji()[index]["frames"][0]
    return (photos() if kind == "sentences" else emoji_images())[index]["image"]


@cache
def _first_questions() -> dict[str, int]:
    return {name: index for index, name in reversed(list(enumerate(easy_vqa()["image_id"])))}


def _shapes() -> Iterator[Image.Image]:
    rows = easy_vqa()
    for name in _questioned_images():
        yield rows[_first_questions()[name]]["image"]


def _frames() -> Iterator[Image.Image]:
    for row in animated_emoji():
        yield from row["frames"]


def _images(rows: datasets.Dataset) -> Iterator[Image.Image]:
    for row in rows:
        yield row["image"]


_EMOJI = ("emoji-1", 1, lambda: _images(emoji_images()))
_IMAGES: dict[str, tuple[str, int, Callable[[], Iterator[Image.Image]]]] = {
    "names": _EMOJI,
    "keywords": _EMOJI,
    "sentences": ("photos-1", 1, lambda: _images(photos())),
    "questions": ("shapes-1", 1, _shapes),
    "animations": ("animations-1", FRAMES, _frames),
}


@torch.inference_mode()
def seen(images: list[Image.Image], batch_size: int = 64) -> Tensor:
    """The states (images, 37, 384) of all tokens."""
    model, processor, states = AutoModel.from_pretrained(dinov2_small()).eval(), image_processor(), []
    for start in track(range(0, len(images), batch_size), "Encoding images", console=CONSOLE, transient=True):
        found = [small(image) for image in images[start : start + batch_size]]
        states.append(model(**processor(found, return_tensors="pt")).last_hidden_state)
    return torch.cat(states)


def small(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
