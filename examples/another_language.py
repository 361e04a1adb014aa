"""Another language: a CLIP that reads English learns to read Chinese from translation pairs, without an image.

    python -m examples.another_language
    python -m examples.another_language --pairs pairs.csv --language pt --model openai/clip-vit-base-patch32 \
        --encoder intfloat/multilingual-e5-small

By default images are searched by names that no training pair has. Of your own pairs (the columns `source` and `target`)
a tenth is held out, and each English text is searched by its translation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, AutoTokenizer, TrainingArguments

from benchmarks.assets import e5_small, emoji_labels, english_clip, translation_pairs
from examples.shared import captioned, first, options_of
from peft_multimodal import CrossLingualAdapterConfig, CrossLingualTrainer, LanguageProcessor, save
from peft_multimodal.evaluation import compute_embeddings, retrieval_recall


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options_of("another_language", steps=600, images=None)
    parser.add_argument("--pairs", help="a csv file with the columns source and target, instead of those fetched")
    parser.add_argument("--language", default="zh", help="without --pairs: zh, ja, de or fa")
    parser.add_argument("--encoder", help="of the language; without it multilingual E5-small is fetched")
    options = parser.parse_args(arguments)
    name, encoder = options.model or str(english_clip()), options.encoder or str(e5_small())

    clip, clip_processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    model = get_peft_model(clip, CrossLingualAdapterConfig(encoder=encoder), adapter_name=options.language)
    tokenizers = {"en": clip_processor.tokenizer, options.language: AutoTokenizer.from_pretrained(encoder)}
    processor = LanguageProcessor(**tokenizers)

    def look(rows: Sequence[Any]) -> Any:
        return clip_processor.image_processor([row["image"] for row in rows], return_tensors="pt")

    def read(texts: Sequence[str], language: str) -> Any:
        batches = [processor(list(texts[i : i + 64]), language=language) for i in range(0, len(texts), 64)]
        with torch.no_grad():
            return torch.cat([model.eval().get_text_features(**batch).pooler_output for batch in batches])

    if options.pairs:
        pairs = load_dataset("csv", data_files=options.pairs, split="train").train_test_split(0.1, seed=0)
        train, queries = pairs["train"], first(pairs["test"], options.limit)["target"]
        index = read(first(pairs["test"], options.limit)["source"], "en")
    else:
        names = emoji_labels(options.language)
        rows = captioned(limit=options.limit, style="google")["test"].filter(names.get, input_columns="id")
        train = translation_pairs(options.language).filter(lambda split: split == "train", input_columns="split")
        queries = [names[concept] for concept in rows["id"]]
        index = compute_embeddings(model, rows, look, progress=False)["image_embeds"]

    before = retrieval_recall(index, read(queries, "en"))  # the English text tower
    args = TrainingArguments(
        str(options.output / "trainer"),
        learning_rate=2e-3,
        weight_decay=1.0,
        max_steps=options.steps,
        per_device_train_batch_size=64,
        lr_scheduler_type="cosine",
        save_strategy="no",
    )
    train = first(train.shuffle(seed=0), options.limit)
    CrossLingualTrainer(model, args, train_dataset=train, processing_class=processor).train()
    after = retrieval_recall(index, read(queries, options.language))  # the index is the one from before training
    save(model, options.output)
    processor.save_pretrained(options.output)
    found = f"{before['mean_recall']:.1f} % by the English text tower, {after['mean_recall']:.1f} % by the adapter"
    print(f"Mean recall by {len(queries)} unseen texts in {options.language!r}: {found}.")
    print(f"The adapter is in {options.output / options.language}.")


if __name__ == "__main__":
    main()
