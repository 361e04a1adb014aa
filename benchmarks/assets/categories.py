"""Images of few, coarse classes: what few-shot classification is tried on.

`categories("emoji")` and `categories("photos")` have one row per image:

| column | content |
| --- | --- |
| `image` | RGB image on white |
| `label` | the class's place in `CLASSES[data]` |
| `style` | emoji: `google`, `twitter` or `fluent`; photos: `photo` or `drawing` |
| `concept` | what the image shows: images of one concept in several styles have it in common |
| `split` | `train`, `validation` or `test` |

A class is made of folders of the source, small ones together, so that at least 16 images of it train. Concepts of one
family lie in one split. Emoji keep the split of `emoji_images()`; photos have one of their own: of each class, shuffled
families train until half of its images and 16 at least do, 30 % of the rest validate.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import datasets

from .images import emoji_images
from .photos import photos

SHOTS, SPLIT_SEED, VALIDATION_SHARE = 16, 0, 0.3
CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "emoji": {
        "mammal": ("animal-mammal",),
        "bird": ("animal-bird",),
        "fish or insect": ("animal-marine", "animal-bug", "animal-reptile", "animal-amphibian"),
        "plant": ("plant-flower", "plant-other"),
        "fruit or vegetable": ("food-fruit", "food-vegetable"),
        "meal": ("food-prepared", "food-asian"),
        "drink": ("drink", "dishware"),
        "car or train": ("transport-ground",),
        "ship or aircraft": ("transport-air", "transport-water"),
        "building": ("place-building", "place-religious", "hotel"),
        "weather": ("sky-weather",),
        "clothes": ("clothing",),
        "tool": ("tool",),
        "household item": ("household",),
        "paper or mail": ("book-paper", "office", "writing", "mail"),
        "sport or game": ("sport", "game"),
        "person at work": ("person-role",),
        "person doing sports": ("person-sport",),
        "face": ("face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical", "face-sleepy",
                 "face-unwell", "face-hat", "face-glasses", "face-concerned", "face-negative", "face-costume"),
        "hand": ("hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands"),
    },
    "photos": {
        "bird": ("animals/birds",),
        "mammal": ("animals/mammals", "animals/marsupials"),
        "insect": ("animals/insects",),
        "fruit": ("food/fruit",),
        "vegetable or dish": ("food/", "food/vegetables", "food/nuts", "food/spices", "food/dessert"),
        "plant": ("plants",),
        "clothes": ("clothes",),
        "house": ("town/houses",),
        "monument": ("town/", "town/monuments"),
        "road sign or flag": ("town/roadsigns", "town/flags"),
        "household item": ("household/", "household/dishes", "household/electronics"),
        "tool": ("household/tools", "household/arttools"),
        "vehicle": ("vehicles",),
        "money": ("symbols/money",),
        "sign or symbol": ("symbols/", "symbols/math", "symbols/music", "symbols/shapes", "symbols/faces"),
        "person": ("people",),
        "Christmas decoration": ("seasonal/christmas", "seasonal/hanukkah", "seasonal/newyears", "seasonal/winter"),
    },
}  # fmt: skip
"""`{data: {class: folders}}`: emoji's subgroups; stamps' paths, all below them included unless they end in a slash."""


@cache
def categories(data: str) -> datasets.Dataset:
    """`emoji` or `photos` with their classes; columns as in the module's docstring."""
    return _emoji() if data == "emoji" else _photos()


def class_of(folder: str, classes: dict[str, tuple[str, ...]]) -> int | None:
    """The class whose longest entry holds the folder: `town/` holds that folder alone, `plants` also `plants/trees`."""
    best: tuple[int, int | None] = (-1, None)
    for label, entries in enumerate(classes.values()):
        for entry in entries:
            if (folder == entry or folder.startswith(f"{entry}/")) and len(entry) > best[0]:
                best = len(entry), label
    return best[1]


def split_class(families: Sequence[str], seed: int = SPLIT_SEED) -> list[str]:
    """The splits of one class's images, of which `families` names one for each; see the module's docstring."""
    order = sorted(set(families))
    random.Random(seed).shuffle(order)
    total, placed, found = len(families), 0, {}
    train = max(SHOTS, total / 2)
    validation = train + VALIDATION_SHARE * (total - train)
    for family in order:
        found[family] = "train" if placed < train else "validation" if placed < validation else "test"
        placed += families.count(family)
    return [found[family] for family in families]


def _emoji() -> datasets.Dataset:
    rows = emoji_images()
    place = {group: label for label, entries in enumerate(CLASSES["emoji"].values()) for group in entries}
    rows = rows.select([i for i, group in enumerate(rows["subgroup"]) if group in place])
    labels = [place[group] for group in rows["subgroup"]]
    return rows.add_column("label", labels).select_columns(["image", "label", "style", "concept", "split"])


def _photos() -> datasets.Dataset:
    rows, classes = photos(), CLASSES["photos"]
    folders = zip(rows["category"], rows["subcategory"], strict=True)
    label_of = [class_of("/".join(pair), classes) for pair in folders]
    rows = rows.select([i for i, label in enumerate(label_of) if label is not None])
    labels = [label for label in label_of if label is not None]
    families, splits = list(rows["family"]), [""] * len(rows)
    for label in range(len(classes)):
        members = [i for i, other in enumerate(labels) if other == label]
        for i, split in zip(members, split_class([families[i] for i in members]), strict=True):
            splits[i] = split
    concepts = [f"{name} {i}" for i, name in enumerate(rows["name"])]
    columns = {"label": labels, "style": list(rows["kind"]), "concept": concepts, "split": splits}
    rows = rows.select_columns(["image"])
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows
