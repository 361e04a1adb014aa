"""A narrow domain: a CLIP learns it from a pool of mostly general pairs, hard ones first, and keeps what it knew.

    python -m examples.narrow_domain
    python -m examples.narrow_domain --images FOLDER --general FOLDER --model openai/clip-vit-base-patch32

By default the domain is a style of images that the CLIP has never seen, and a seventh of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, TrainingArguments

from benchmarks.assets import english_clip
from examples.shared import captioned, options_of
from peft_multimodal import (
    ContrastiveTrainer,
    HardSampleBank,
    HardSampleDomainAdapterConfig,
    ImageTextCollator,
    save,
)
from peft_multimodal.evaluation import compute_embeddings, forgetting, retrieval_recall


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options_of("narrow_domain", steps=100)
    parser.add_argument("--general", type=Path, help="a folder of general images with captions")
    options = parser.parse_args(arguments)

    domain, general = captioned(options.images, options.limit), captioned(options.general, options.limit, "google")
    if options.images is None:
        domain["train"] = domain["train"].shard(6, 0)
    known = general["train"].map(lambda id: {"id": f"general {id}"}, input_columns="id")  # ids tell pairs apart
    pool = concatenate_datasets([domain["train"], known])

    name = options.model or str(english_clip())
    model = get_peft_model(AutoModel.from_pretrained(name), HardSampleDomainAdapterConfig())
    collator = ImageTextCollator(AutoProcessor.from_pretrained(name), model=model)
    bank = HardSampleBank.from_model(model, pool, id_column="id", collator=collator, progress=False)
    bank.report(options.output / "hard.html", pool)  # look at it: are the hardest pairs hard, or wrong?

    def recall(model: Any, rows: Dataset) -> float:
        embeds: Any = compute_embeddings(model, rows, collator, progress=False)
        return retrieval_recall(**embeds)["mean_recall"]

    before, general_before = recall(model, domain["test"]), recall(model, general["test"])
    args = TrainingArguments(
        str(options.output / "trainer"),
        learning_rate=1e-3,
        max_steps=options.steps,
        per_device_train_batch_size=32,
        lr_scheduler_type="cosine",
        save_strategy="no",
    )
    ContrastiveTrainer(model, args, collator, pool, hard_samples=bank).train()
    kept = forgetting(model, lambda model: recall(model, general["test"]), general_before)
    save(model, options.output)
    print(f"Mean recall in the domain: {before:.1f} % before, {recall(model, domain['test']):.1f} % after.")
    print(
        f"General mean recall: {kept.before:.1f} % before, {kept.on:.1f} % after, {kept.off:.1f} % with the adapter off."
    )
    print(f"The adapter is in {options.output}, and hard.html shows the hardest pairs.")


if __name__ == "__main__":
    main()
