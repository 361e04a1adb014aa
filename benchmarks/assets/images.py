"""Emoji images in three styles with English and Chinese labels, split by concept family.

`emoji_images()` has one row per concept and style:

| column | content |
| --- | --- |
| `concept` | the emoji's code points, `1F34E` |
| `family` | concepts that show the same thing in another variant share it, see `family_of` |
| `style` | `google`, `twitter`, or `fluent`, the style that the English CLIP has never seen |
| `image` | 84 x 84 RGB image on white |
| `label_en`, `label_zh` | the name, unique among the concepts |
| `tags_en`, `tags_zh` | lists of keywords, some empty |
| `group`, `subgroup` | `food-drink`, `food-fruit` |
| `split` | `train`, `validation` or `test`; a family lies in one split, for every style |

The labels are those of Unicode CLDR, as emojibase-data has them; flags are left out.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from rich.progress import track

from .fetch import CONSOLE, Package, build_once, fetch

SIZE = 84
"""Pixels a side of the stored images: 6 x 6 patches of 14."""
STYLES = ("google", "twitter", "fluent")
OLD_STYLES, NEW_STYLE = ("google", "twitter"), "fluent"
SPLIT_SEED, TEST_CONCEPTS, VALIDATION_CONCEPTS, LARGEST_FAMILY = 0, 380, 180, 10

LABELS = Package(
    "npm",
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    megabytes=7,
    licence="MIT",
    keep=("package/en/", "package/zh/", "package/LICENSE"),
)
IMAGES = {
    "google": Package(
        "npm",
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        megabytes=74,
        licence="MIT, images Apache-2.0",
        keep=("package/img/google/64/",),
    ),
    "twitter": Package(
        "npm",
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        megabytes=62,
        licence="MIT, images CC-BY-4.0",
        keep=("package/img/twitter/64/",),
    ),
    "fluent": Package(
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        megabytes=16,
        licence="MIT",
        keep=("package/assets/",),
    ),
}

FEATURES = datasets.Features(
    {
        "concept": datasets.Value("string"),
        "family": datasets.Value("string"),
        "style": datasets.Value("string"),
        "image": datasets.Image(),
        "label_en": datasets.Value("string"),
        "label_zh": datasets.Value("string"),
        "tags_en": datasets.List(datasets.Value("string")),
        "tags_zh": datasets.List(datasets.Value("string")),
        "group": datasets.Value("string"),
        "subgroup": datasets.Value("string"),
        "split": datasets.Value("string"),
    }
)

# What a label says about the variant rather than the thing. After a colon CLDR names the variant itself (a skin tone,
# hair, a keycap's digit, a family's members); text in capitals, quotes or parentheses is written on the image.
QUALIFIER = re.compile(r":.*|“[^”]*”|\([^)]*\)|\bshowing .*")
CLOCK_FACE = re.compile(r"\w+(?: o’clock|-thirty)")
SAME_THING = {"merman": "mer", "mermaid": "mer", "merperson": "mer", "prince": "crown", "princess": "crown"}
VARIANT = re.compile(
    r"(?:wo)?m[ae]n(?:’s)?|person|people|boy|girl|male|female|older|old|santa|mrs|mx"  # gender and age
    r"|red|orange|yellow|light|blue|green|purple|brown|pink|black|gr[ae]y|white"  # colour
    r"|(?:left|right|up|down)(?:wards)?|facing|oncoming|tilted|departure|arrival"  # direction
    r"|large|medium|small|low|high|increasing|decreasing|open|closed|raised|lowered|done|not"  # size and state
    r"|waxing|waning|gibbous|crescent|quarter|new|full|first|next|last"  # phase and order
    r"|one|two|three|double|single|\d+(?:st|nd|rd|th)?|yen|dollar|euro|pound|with|and"  # number, currency, joints
)


def family_of(label: str) -> str:
    """The family of an English CLDR label: what is left when the words that only tell variants apart are gone.

    Gender, age, skin tone, hair, colour, direction, size, phase, number and the text written on a button make variants;
    so `man cook` and `cook`, `keycap: 3` and `keycap: #`, `red heart` and `two hearts`, all clock faces, and all
    people without an occupation stay together.
    """
    if CLOCK_FACE.fullmatch(label):
        return "clock face"
    words = re.findall(r"[^\W_]+(?:’s)?", QUALIFIER.sub("", label))
    words = [word for word in words if not word.isupper()] or words
    kept = [SAME_THING.get(word.lower(), word.lower()) for word in words]
    kept = [re.sub(r"(?<=[^su])s$", "", word) for word in kept if not VARIANT.fullmatch(word)]
    return " ".join(kept) or "person"


def split_families(families: Iterable[str], test: int, validation: int, largest: int, seed: int) -> dict[str, str]:
    """Deal whole families to the splits, `families` naming one for each concept.

    Shuffled families fill `test` until it holds that many concepts, then `validation`; the rest trains. So does every
    family of more than `largest` concepts: its members are hardly told apart at this size, and in a gallery of a few
    hundred they would weigh as much as everything that differs.
    """
    sizes: dict[str, int] = {}
    for family in families:
        sizes[family] = sizes.get(family, 0) + 1
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    room = {"test": test, "validation": validation}
    dealt = {}
    for family in order:
        split = next((name for name in room if sizes[family] <= min(room[name], largest)), "train")
        if split != "train":
            room[split] -= sizes[family]
        dealt[family] = split
    return dealt


def emoji_images() -> datasets.Dataset:
    """Emoji in three styles with English and Chinese labels; columns as in the module's docstring."""
    return datasets.load_from_disk(str(build_once("emoji-pictures-1", _build_images)), keep_in_memory=True)


def _build_images(folder: Path) -> None:
    labels = fetch(LABELS) / "package"
    files = {style: images_by_code(fetch(IMAGES[style])) for style in STYLES}
    names = json.loads((labels / "en/messages.json").read_text("utf-8"))
    groups, subgroups = ({item["order"]: item["key"] for item in names[kind]} for kind in ("groups", "subgroups"))
    english, chinese = (
        {entry["hexcode"]: entry for entry in json.loads((labels / language / "data.json").read_text("utf-8"))}
        for language in ("en", "zh")
    )
    concepts = [
        code
        for code, entry in english.items()
        if groups.get(entry.get("group"), "flags") != "flags" and all(bare(code) in files[style] for style in STYLES)
    ]
    for language in (english, chinese):
        counts: dict[str, int] = {}
        for code in concepts:
            counts[language[code]["label"]] = counts.get(language[code]["label"], 0) + 1
        concepts = [code for code in concepts if counts[language[code]["label"]] == 1]
    family = {code: family_of(english[code]["label"]) for code in concepts}
    split = split_families(family.values(), TEST_CONCEPTS, VALIDATION_CONCEPTS, LARGEST_FAMILY, SPLIT_SEED)

    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for code in track(concepts, "Drawing images", console=CONSOLE):
        entry = english[code]
        for style in STYLES:
            row = {
                "concept": code,
                "family": family[code],
                "style": style,
                "image": {"bytes": as_png(on_white(Image.open(files[style][bare(code)]))), "path": None},
                "label_en": entry["label"],
                "label_zh": chinese[code]["label"],
                "tags_en": entry.get("tags", []),
                "tags_zh": chinese[code].get("tags", []),
                "group": groups[entry["group"]],
                "subgroup": subgroups[entry["subgroup"]],
                "split": split[family[code]],
            }
            for name, value in row.items():
                columns[name].append(value)
    datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(str(folder))


def bare(code: str) -> str:
    """Code points without the variation selector, which the packages write or leave out as they like."""
    return code.upper().replace("-FE0F", "")


def images_by_code(folder: Path) -> dict[str, Path]:
    """The image files below `folder` by `bare` code points."""
    return {bare(path.stem): path for path in folder.rglob("*") if path.suffix in {".png", ".webp"}}


def on_white(image: Image.Image) -> Image.Image:
    """The image on a white ground, `SIZE` pixels a side."""
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return ground.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def as_png(image: Image.Image) -> bytes:
    """The image's PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
