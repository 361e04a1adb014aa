"""What the examples share: their options, and data that is yours or real and fetched once."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from datasets import Dataset, DatasetDict, Image, Value, load_dataset

from benchmarks.assets import easy_vqa, emoji_images
from benchmarks.assets.images import NEW_STYLE

SPLITS = ("train", "test")


IMAGES = "a folder of yours: images with captions in metadata.csv, or in their names; without it images are fetched"


def options_of(name: str, steps: int, limit: int | None = None, images: str | None = IMAGES) -> argparse.ArgumentParser:
    """The options that all examples have; `images` says what --images is, where there is such an option."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{name}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if images is not None:
        parser.add_argument("--images", type=Path, help=images)
    parser.add_argument("--model", help="a Hub id or folder; without it a small pretrained model is fetched")
    parser.add_argument("--steps", type=int, default=steps, help="of training")
    parser.add_argument("--limit", type=int, default=limit, help="train and test on so many rows each")
    parser.add_argument("--output", type=Path, default=Path("runs/examples", name), help="where the adapter is saved")
    return parser


def captioned(folder: Path | None = None, limit: int | None = None, style: str = NEW_STYLE) -> DatasetDict:
    """Images with captions in the columns `image`, `text` and `id`, in the splits `train` and `test`.

    Args:
        folder: Images, and their captions in the column `text` of metadata.csv; without that column the files' names are
            the captions (`red_apple.png`). A fifth is held out. None takes emoji by their English names.
        limit: At most so many rows of each split.
        style: Of the emoji. The default is one that the examples' CLIP has never seen.
    """
    data = _emoji(style) if folder is None else _own(folder)
    return DatasetDict({name: first(rows, limit) for name, rows in data.items()})


def first(rows: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _emoji(style: str) -> DatasetDict:
    columns = {"label_en": "text", "concept": "id"}
    rows = emoji_images().select_columns(["image", *columns, "style", "split"]).rename_columns(columns)
    rows = rows.filter(lambda s: s == style, input_columns="style").remove_columns("style")
    return _by_split(rows)


def _own(folder: Path) -> DatasetDict:
    rows = load_dataset("imagefolder", data_dir=str(folder), split="train")
    files = [file["path"] for file in rows.cast_column("image", Image(decode=False))["image"]]
    if "text" not in rows.column_names:
        rows = rows.add_column("text", [Path(file).stem.replace("_", " ") for file in files])
    if "id" not in rows.column_names:
        rows = rows.add_column("id", files)
    rows = rows.cast_column("id", Value("string")).select_columns(["image", "text", "id"])
    return rows.train_test_split(0.2, seed=0)


def labelled(folder: Path | None, shots: int) -> DatasetDict:
    """Images with a `label` whose feature names the classes: `shots` of each class in the split `train`, and `test`.

    Args:
        folder: A folder of images for each class, called as the class; a fifth is held out. None takes emoji by group.
    """
    if folder is not None:
        data = load_dataset("imagefolder", data_dir=str(folder), split="train").train_test_split(0.2, seed=0)
    else:
        rows = emoji_images().filter(lambda style: style == "google", input_columns="style")
        rows = rows.map(lambda group: {"label": group.replace("-", " and ")}, input_columns="group")
        data = _by_split(rows.select_columns(["image", "label", "split"]).class_encode_column("label"))
    train, places = data["train"].shuffle(seed=0), defaultdict[int, list[int]](list)
    for place, label in enumerate(train["label"]):
        places[label].append(place)
    data["train"] = train.select([place for found in places.values() for place in found[:shots]])
    return data


def answered(folder: Path | None = None, limit: int | None = None) -> DatasetDict:
    """Images with a `question` and an `answer`: a shape's colour, or of a folder of yours the captions, unasked."""
    if folder is not None:
        data = captioned(folder, limit).rename_column("text", "answer")
        return data.map(lambda _: {"question": ""}, input_columns="answer")
    rows = easy_vqa().filter(lambda question: question.startswith("what color"), input_columns="question")
    rows = rows.select_columns(["image", "question", "answer", "split"]).shuffle(seed=0)
    return DatasetDict({name: first(part, limit) for name, part in _by_split(rows).items()})


def _by_split(rows: Dataset) -> DatasetDict:
    places = {name: [i for i, split in enumerate(rows["split"]) if split == name] for name in SPLITS}
    return DatasetDict({name: rows.select(found).remove_columns("split") for name, found in places.items()})
