"""easy-VQA: questions about images of one coloured shape.

`easy_vqa()` has one row per question:

| column | content |
| --- | --- |
| `image` | 64 x 64 RGB image |
| `image_id` | `train-17`; the questions about one image share it |
| `question`, `answer` | English, 13 answers: yes, no, three shapes and eight colours |
| `split` | `train` and `test` as the package has them, `validation` a tenth of the training images |
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import datasets

from .fetch import Package, build_once, fetch

EASY_VQA = Package(
    "pip",
    "easy-vqa",
    "1.0",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    megabytes=3,
    licence="MIT",
    keep=("easy_vqa/data/",),
)
VALIDATION_SHARE, SPLIT_SEED = 0.1, 0

FEATURES = datasets.Features(
    {"image": datasets.Image()}
    | {name: datasets.Value("string") for name in ("image_id", "question", "answer", "split")}
)


def easy_vqa() -> datasets.Dataset:
    """Questions about images of one shape; columns as in the module's docstring."""
    return datasets.load_from_disk(str(build_once("easy-vqa-1", _build)), keep_in_memory=True)


def _build(folder: Path) -> None:
    data = fetch(EASY_VQA) / "easy_vqa/data"
    columns: dict[str, list] = {name: [] for name in FEATURES}
    for part in ("train", "test"):
        questions = json.loads((data / part / "questions.json").read_text("utf-8"))
        images = sorted({image for _, _, image in questions})
        held_out: set[int] = set()
        if part == "train":
            held_out.update(random.Random(SPLIT_SEED).sample(images, round(VALIDATION_SHARE * len(images))))
        files = {image: (data / part / "images" / f"{image}.png").read_bytes() for image in images}
        for question, answer, image in questions:
            columns["image"].append({"bytes": files[image], "path": None})
            columns["image_id"].append(f"{part}-{image}")
            columns["question"].append(question)
            columns["answer"].append(answer)
            columns["split"].append("validation" if image in held_out else part)
    datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(str(folder))
