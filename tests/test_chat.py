"""Vision-language models fine-tuned on conversations: chat templates, label masks, the stock Trainer, TRL's SFTTrainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from families import BOS, EOS, FAMILIES, IMAGE, PAD, VOCAB, Family
from methods import CASES, adapter, wrap
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[BOS]{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %} {{ c.text }}{% endif %}{% endfor %}"
    "{% else %} : {% generation %}{{ m.content[0].text }} [EOS]{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} :{% endif %}"
)
WORDS = {"what": 4, "colour": 5, "red": 6, "green": 7, ":": 8}
COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10)}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = {"[PAD]": PAD, "[BOS]": BOS, "[EOS]": EOS, "[UNK]": 3, "<image>": IMAGE, "<video>": IMAGE + 1, **WORDS}
    vocabulary = {f"w{i}": i for i in range(VOCAB) if i not in words.values()} | words
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "bos", "eos", "unk")}
    media = {"image_token": "<image>", "video_token": "<video>"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side="left", chat_template=TEMPLATE, extra_special_tokens=media, **special
    )


class ImageProcessor(hf.Qwen2_5_VLProcessor):
    """Without the processor of videos, for which torchvision has to be there."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        pass


def processor(name: str) -> Any:
    if name == "llava":
        images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
        shape = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return hf.LlavaProcessor(images, tokenizer(), image_token="<image>", chat_template=TEMPLATE, **shape)
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)
    return ImageProcessor(images, tokenizer(), None, chat_template=TEMPLATE)


def conversation(colour: str, size: int = 16, answer: bool = True) -> list[dict]:
    image = Image.fromarray(np.full((size, 16, 3), COLOURS[colour], np.uint8))
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "what colour"}]
    answered = [{"role": "assistant", "content": [{"type": "text", "text": colour}]}]
    return [{"role": "user", "content": asked}, *(answered if answer else [])]


class Collator:
    """Conversations -> a batch whose labels are the assistant's words alone."""

    def __init__(self, name: str, method: str) -> None:
        self.processor, self.method = processor(name), method

    def __call__(self, rows: list[list[dict]], answered: bool = True) -> dict[str, Any]:
        batch = self.processor.apply_chat_template(
            rows,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=not answered,
            return_assistant_tokens_mask=answered,
            processor_kwargs={"return_tensors": "pt", "padding": True},
        )
        if answered:
            said = torch.as_tensor(batch.pop("assistant_masks")).bool()
            batch["labels"] = batch["input_ids"].masked_fill(~said, -100)
        if self.method == "gated_xattn":  # its marker is the row's first token
            colours = [np.asarray(row[0]["content"][0]["image"])[0, 0] / 100.0 for row in rows]
            seen = torch.tensor(np.array(colours), dtype=torch.float32)
            batch["vision_features"] = seen.repeat(1, 7)[:, None, None, None, :20].expand(-1, 1, 1, 2, -1).contiguous()
        return dict(batch)


ROWS = [conversation("red"), conversation("green"), conversation("red", 8), conversation("green", 8)]
FITTING = [(n, m) for n, m in CASES if n in ("llava", "qwen2_5_vl")]


@pytest.mark.parametrize(("name", "method"), FITTING)
def test_learns_conversations_and_generates_alike_with_and_without_the_cache(name: str, method: str, tmp_path: Path):
    family: Family = FAMILIES[name]
    model, collate = wrap(family, method, stirred=False), Collator(name, method)
    batch = collate(ROWS)
    said = batch["labels"] != -100
    assert batch["labels"][said].view(-1, 2).tolist() == [[WORDS[c], EOS] for c in ("red", "green") * 2]
    arguments = hf.TrainingArguments(
        **{"output_dir": str(tmp_path), "max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 0.03},
        **{"eval_strategy": "steps", "eval_steps": 30, "save_strategy": "no", "report_to": "none", "use_cpu": True},
        **{"remove_unused_columns": False, "label_names": ["labels"], "disable_tqdm": True, "logging_steps": 1},
    )
    trainer = hf.Trainer(model, arguments, data_collator=collate, train_dataset=ROWS, eval_dataset=ROWS[:2])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert [math.isfinite(e["eval_loss"]) for e in trainer.state.log_history if "eval_loss" in e] == [True]

    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(family.build(), tmp_path / "saved")
    asked = collate([conversation("red", answer=False), conversation("green", answer=False)], answered=False)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE, IMAGE + 1]}
    model.eval()
    cached, uncached, again = (
        m.generate(**asked, use_cache=use_cache, **options).tolist()
        for m, use_cache in ((model, True), (model, False), (loaded, True))
    )
    assert cached == uncached == again
    with model.disable_adapter():
        bare = {k: v for k, v in asked.items() if k != "vision_features"}
        assert model.generate(**bare, use_cache=True, **options).tolist() != cached


@pytest.mark.parametrize(("name", "method"), [(n, m) for n, m in FITTING if n == "llava"])
def test_trl_trains_conversations(name: str, method: str, tmp_path: Path):
    """With a model that is wrapped already, and a collator of one's own."""
    trl = pytest.importorskip("trl", reason="trl isn't installed: pip install 'peft-multimodal[integrations]'")
    model, collate = wrap(FAMILIES[name], method, stirred=False), Collator(name, method)
    rows = datasets.Dataset.from_list([{"colour": c, "size": size} for size in (16, 8) for c in COLOURS])

    def collator(rows: list[dict]) -> dict[str, Any]:
        return collate([conversation(**row) for row in rows])

    before = {n: p.detach().clone() for n, p in adapter(model).items()}
    arguments = trl.SFTConfig(
        **{"output_dir": str(tmp_path), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.03},
        **{"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "bf16": False},
        **{"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "save_strategy": "no"},
        **{"gradient_checkpointing": False, "max_length": None},
    )
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, processing_class=collate.processor
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = {n for n, p in adapter(trainer.model).items() if not torch.equal(p, before[n])}
    assert moved
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == set(before)
