"""Many processes: the contrastive loss sees the pairs of all of them, and so does the recall.

    torchrun --nproc-per-node=2 -m examples.many_processes
    torchrun --nproc-per-node=8 -m examples.many_processes --images FOLDER --model openai/clip-vit-base-patch32

`accelerate launch -m examples.many_processes` starts it as well, after `accelerate config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, TrainingArguments

from benchmarks.assets import english_clip
from examples.shared import captioned, options_of
from peft_multimodal import AuroraModeApproxConfig, ContrastiveTrainer, ImageTextCollator
from peft_multimodal.evaluation import retrieval_recall


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options_of("many_processes", steps=60)
    parser.add_argument("--batch", type=int, default=16, help="pairs of each process")
    options = parser.parse_args(arguments)

    data = captioned(options.images, options.limit)
    name = options.model or str(english_clip())
    model = get_peft_model(AutoModel.from_pretrained(name), AuroraModeApproxConfig(r=64))
    args = TrainingArguments(
        str(options.output / "trainer"),
        learning_rate=3e-3,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        lr_scheduler_type="cosine",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    collator = ImageTextCollator(AutoProcessor.from_pretrained(name), model=model)
    trainer = ContrastiveTrainer(model, args, collator, data["train"], data["test"], compute_metrics=recall)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(str(options.output))  # the first process writes
    if trainer.is_world_process_zero():
        found = f"{before['eval_mean_recall']:.1f} % before, {after['eval_mean_recall']:.1f} % after"
        print(f"Mean recall on {len(data['test'])} unseen images: {found}.")
        print(f"{args.world_size} process(es) trained it. The adapter is in {options.output}.")


def recall(embeds: Any) -> dict[str, float]:
    """Of the embeddings of all processes together."""
    return retrieval_recall(torch.tensor(embeds.predictions), torch.tensor(embeds.label_ids))


if __name__ == "__main__":
    main()
