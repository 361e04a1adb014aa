"""Images with captions: AuroraModeApprox and the stock `Trainer` adapt a CLIP to them.

    python -m examples.images_and_captions
    python -m examples.images_and_captions --images FOLDER --model openai/clip-vit-base-patch32

By default a CLIP learns a style of images that it has never seen, and is tested on concepts that no training pair has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from benchmarks.assets import english_clip
from examples.shared import captioned, options_of
from peft_multimodal import AdapterCallback, AuroraModeApproxConfig, ImageTextCollator, save
from peft_multimodal.evaluation import compute_embeddings, retrieval_recall


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of("images_and_captions", steps=60).parse_args(arguments)

    data = captioned(options.images, options.limit)
    name = options.model or str(english_clip())
    model = get_peft_model(AutoModel.from_pretrained(name), AuroraModeApproxConfig(r=64))
    collator = ImageTextCollator(AutoProcessor.from_pretrained(name), model=model)

    def recall() -> float:
        embeds: Any = compute_embeddings(model, data["test"], collator, progress=False)
        return retrieval_recall(**embeds)["mean_recall"]

    before = recall()  # a new adapter changes nothing
    args = TrainingArguments(
        str(options.output / "trainer"),
        learning_rate=3e-3,
        max_steps=options.steps,
        per_device_train_batch_size=32,
        lr_scheduler_type="cosine",
        save_strategy="no",
        remove_unused_columns=False,  # the collator reads the columns
        label_names=[],  # the model computes its own loss
    )
    Trainer(model, args, collator, data["train"], callbacks=[AdapterCallback()]).train()
    save(model, options.output)
    print(f"Mean recall on {len(data['test'])} unseen images: {before:.1f} % before, {recall():.1f} % after.")
    print(f"The adapter is in {options.output}.")


if __name__ == "__main__":
    main()
