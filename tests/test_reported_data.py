"""What people reported about data: images, captions, lengths, ids and languages, as the users did it."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from PIL import Image

from peft_multimodal import HardSampleBank, ImageTextCollator, QuestionAnswerCollator
from peft_multimodal.data import FiniteBatches, evaluating
from peft_multimodal.evaluation import compute_embeddings, retrieval_recall
from peft_multimodal.training.losses import retrieval_embeddings

WORDS = ["[PAD]", "[DEC]", "[EOS]", "[SEP]", "[CLS]", "[UNK]", *(f"w{i}" for i in range(50))]
START = 1


def make_processor(limit: int = 16) -> hf.BlipProcessor:
    tokenizer = hf.BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=limit)
    return hf.BlipProcessor(hf.BlipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def captioned(count: int = 6) -> list[dict]:
    """Images of one shade each, with three captions of different length."""
    return [
        {
            "id": f"row-{i}",
            "image": Image.new("RGB", (20, 20), (40 * i, 10, 200)),
            "text": [f"w{i}", f"w{i} w{i + 1}", f"w{i} w9 w8"],
        }
        for i in range(count)
    ]


# ------------------------------------------------------------------------------------------- several captions an image


def test_training_draws_a_caption_and_evaluation_takes_the_first(processor):
    collator = ImageTextCollator(processor, model=FAMILIES["clip"].build())
    torch.manual_seed(0)
    assert len({tuple(collator(captioned())["attention_mask"].sum(1).tolist()) for _ in range(5)}) > 1
    for switch in (collator.evaluating(), evaluating(FiniteBatches(collator)).collator, evaluating(collator)):
        state = torch.get_rng_state()
        assert switch(captioned())["attention_mask"].sum(1).tolist() == [3] * 6
        assert torch.equal(torch.get_rng_state(), state)
        assert switch(captioned())["return_loss"] is True
    assert collator.random_text  # the collator itself goes on drawing


def test_evaluation_can_take_every_caption(processor):
    batch = ImageTextCollator(processor, return_loss=True).evaluating(every_text=True)(captioned(2))
    assert batch["pixel_values"].shape[0] == 2
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 5] * 2
    assert batch["text_rows"].tolist() == [0, 0, 0, 1, 1, 1]
    assert "return_loss" not in batch
    with pytest.raises(ValueError, match="Row 1: the text in column 'text' is empty"):
        ImageTextCollator(processor).evaluating(every_text=True)(
            [*captioned(1), {**captioned(2)[1], "text": ["w1", ""]}]
        )


def test_an_answer_is_drawn_in_training_alone(processor):
    rows = [{**row, "question": "w1", "answer": row["text"]} for row in captioned()]
    collator = QuestionAnswerCollator(processor, decoder_start_token_id=START)
    assert {tuple(evaluating(collator)(rows)["decoder_attention_mask"].sum(1).tolist()) for _ in range(5)} == {(3,) * 6}
    with pytest.raises(ValueError, match="One answer is decoded at a time"):
        collator.evaluating(every_text=True)


@pytest.mark.parametrize("name", ["clip", "blip_retrieval"])
def test_recall_counts_any_caption_and_is_the_same_each_time(processor, name):
    model, rows, options = FAMILIES[name].build(), captioned(), {"batch_size": 4, "progress": False}
    if name == "blip_retrieval":
        options["encode"] = retrieval_embeddings
    collator = ImageTextCollator(processor)
    found = compute_embeddings(model, rows, collator, **options)
    again = compute_embeddings(model, rows, FiniteBatches(collator), **options)
    assert found.keys() == again.keys() == {"image_embeds", "text_embeds", "image_ids", "text_ids"}
    assert all(torch.equal(found[key], again[key]) for key in found)
    assert found["text_ids"].tolist() == [i for i in range(6) for _ in range(3)]
    singles = [{**row, "text": text} for row in rows for text in row["text"]]
    alone = compute_embeddings(model, singles, collator, **options)
    torch.testing.assert_close(found["text_embeds"], alone["text_embeds"], rtol=1e-4, atol=1e-5)
    assert set(alone) == {"image_embeds", "text_embeds"}  # one caption an image: row i matches row i
    # An image whose third caption alone is near counts; each caption is a query of its own.
    image, text = torch.eye(6), -torch.eye(6).repeat_interleave(3, 0)
    text[2::3] *= -1
    recall = retrieval_recall(image, text, found["image_ids"], found["text_ids"], ks=(1,))
    assert recall["i2t_r@1"] == 100
    assert recall["t2i_r@1"] == pytest.approx(100 / 3)


def test_a_bank_is_the_same_each_time_it_is_made(processor):
    model = get_peft_model(FAMILIES["clip"].build(), LoraConfig(target_modules=["q_proj"]))
    made = [
        HardSampleBank.from_model(model, captioned(), collator=collator, progress=False).difficulty
        for collator in (ImageTextCollator(processor), FiniteBatches(ImageTextCollator(processor)))
    ]
    first = [{**row, "text": row["text"][0]} for row in captioned()]
    made.append(
        HardSampleBank.from_model(model, first, collator=ImageTextCollator(processor), progress=False).difficulty
    )
    assert (made[0] == made[1]).all()
    assert (made[0] == made[2]).all()
