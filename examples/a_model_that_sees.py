"""A language model that sees: GatedXAttn joins SmolLM2 and DINOv2, which both stay frozen.

    python -m examples.a_model_that_sees
    python -m examples.a_model_that_sees --images FOLDER --model HuggingFaceTB/SmolLM2-135M --vision facebook/dinov2-small

By default it learns to name the colour of a shape. Of your own images it learns the captions. Whether it looks is
tested by another image in the place of each one: the right answer is then as unlikely as a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from benchmarks.assets import dinov2_small, english_clip, smollm2
from examples.shared import answered, options_of
from peft_multimodal import AdapterCallback, GatedXAttnConfig, InterleavedProcessor, save


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options_of("a_model_that_sees", steps=100, limit=400)
    parser.add_argument("--vision", help="a Hub id or folder of an encoder; without it DINOv2-S is fetched")
    options = parser.parse_args(arguments)

    lm = AutoModelForCausalLM.from_pretrained(options.model or smollm2())
    tokenizer = AutoTokenizer.from_pretrained(options.model or smollm2())
    tokenizer.pad_token = tokenizer.eos_token  # padding is in no loss
    look = AutoImageProcessor.from_pretrained(options.vision or english_clip())
    processor = InterleavedProcessor(tokenizer, look, model=lm)
    vision = str(options.vision or dinov2_small())
    model = get_peft_model(lm, GatedXAttnConfig(vision_encoder=vision, media_token_id=processor.media_token_id))

    data = answered(options.images, options.limit)
    args = TrainingArguments(
        str(options.output / "trainer"),
        learning_rate=2e-3,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    pages = data["train"].with_transform(as_texts)
    trainer = Trainer(model, args, processor.collate, pages, callbacks=[AdapterCallback()])
    trainer.train()
    save(model, options.output)
    processor.save_pretrained(options.output)
    own, other = (
        trainer.evaluate(rows.with_transform(as_texts))["eval_loss"] for rows in (data["test"], swapped(data["test"]))
    )
    print(f"Loss of {len(data['test'])} unseen answers: {own:.2f} with their image, {other:.2f} with another one.")
    print(f"The adapter is in {options.output}.")


def as_texts(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """As `InterleavedProcessor.collate` takes them: `<image>` stands where the image is."""
    return {
        "text": [f"<image>{question}" for question in rows["question"]],
        "answer": [f" {answer}" for answer in rows["answer"]],
        "images": [[image] for image in rows["image"]],
    }


def swapped(rows: Dataset) -> Dataset:
    """The same questions and answers, each with the image of another answer."""
    order = sorted(range(len(rows)), key=rows["answer"].__getitem__)
    half = order[len(order) // 2 :] + order[: len(order) // 2]
    texts, images = rows.select(order).remove_columns("image"), rows.select(half).select_columns("image")
    return concatenate_datasets([texts, images], axis=1)


if __name__ == "__main__":
    main()
