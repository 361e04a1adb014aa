"""Few labels: StructuredPrompt makes a classifier of a CLIP from a few labelled images of each class.

    python -m examples.few_labels
    python -m examples.few_labels --images FOLDER --model openai/clip-vit-base-patch32

FOLDER has a folder of images for each class, whose name is the class's; a fifth of the images is held out. By default the
classes are eight groups of emoji.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from benchmarks.assets import english_clip
from examples.shared import first, labelled, options_of
from peft_multimodal import AdapterCallback, StructuredPromptConfig, read_image, save


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options_of("few_labels", steps=100, images="a folder of yours that has a folder of images for each class")
    parser.add_argument("--shots", type=int, default=8, help="images of each class to train on")
    options = parser.parse_args(arguments)

    data = labelled(options.images, options.shots)
    names, name = data["train"].features["label"].names, options.model or str(english_clip())
    processor = AutoProcessor.from_pretrained(name)
    model = get_peft_model(AutoModel.from_pretrained(name), StructuredPromptConfig(num_general=4, num_instance=4))
    model.set_classes(names, processor.tokenizer)

    def pixels(rows: dict[str, Any]) -> dict[str, Any]:
        images = [read_image(image) for image in rows["image"]]
        return {**processor.image_processor(images, return_tensors="pt"), "labels": rows["label"]}

    train = data["train"].with_transform(pixels)
    test = first(data["test"].shuffle(seed=0), options.limit).with_transform(pixels)
    args = TrainingArguments(
        str(options.output / "trainer"),
        learning_rate=3e-3,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    Trainer(model, args, train_dataset=train, callbacks=[AdapterCallback()]).train()
    save(model, options.output)
    model.eval()
    learnt = accuracy(lambda x: model(pixel_values=x).logits, test)
    zero_shot = accuracy(lambda x: model.zero_shot_logits(x, template="a photo of a {}"), test)
    print(f"Right of {len(test)} unseen images: {zero_shot:.1f} % zero-shot, {learnt:.1f} % from {len(train)} labels.")
    print(f"The adapter is in {options.output}.")


@torch.no_grad()
def accuracy(classify: Callable[[Tensor], Tensor], rows: Dataset) -> float:
    """Percent of the rows whose class has the highest logit."""
    right = 0
    for i in range(0, len(rows), 32):
        batch = rows[i : i + 32]
        right += int((classify(batch["pixel_values"]).argmax(-1) == torch.tensor(batch["labels"])).sum())
    return 100 * right / len(rows)


if __name__ == "__main__":
    main()
