"""data.py with a real processor on a tiny vocabulary."""

from __future__ import annotations

import pickle

import datasets
import pytest
import torch
import transformers as hf
from families import FAMILIES, PAD, SEP
from peft import LoraConfig, get_peft_model
from PIL import Image

from peft_multimodal.data import ImageTextCollator, QuestionAnswerCollator

WORDS = [
    "[PAD]",
    "[DEC]",
    "[EOS]",
    "[SEP]",
    "[CLS]",
    "[UNK]",
    *["what", "color", "is", "the", "a", "red", "blue", "dog", "cat", "yes", "no", "two"],
]
ID = {word: i for i, word in enumerate(WORDS)}
START = ID["[DEC]"]


@pytest.fixture(scope="module")
def processor():
    tokenizer = hf.BertTokenizerFast(vocab=ID, model_max_length=16)
    images = hf.BlipImageProcessorPil(size={"height": 16, "width": 16})
    return hf.BlipProcessor(images, tokenizer)


def image(mode="RGB", shade=0):
    return Image.new("L", (20, 30), shade).convert(mode)


def pairs(*texts):
    return [{"image": image(shade=40 * i), "text": text} for i, text in enumerate(texts)]


# --------------------------------------------------------------------------------------------------- image and text


def test_pairs(processor):
    batch = ImageTextCollator(processor)(pairs("a red dog", "blue cat"))
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    cls, sep = ID["[CLS]"], ID["[SEP]"]
    assert batch["input_ids"].tolist() == [
        [cls, ID["a"], ID["red"], ID["dog"], sep],
        [cls, ID["blue"], ID["cat"], sep, PAD],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    alone = processor(images=image(shade=40), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"][1:], alone)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_becomes_rgb(processor, mode):
    batch = ImageTextCollator(processor)([{"image": image(mode, 255), "text": "a"}])
    white = ImageTextCollator(processor)([{"image": image("RGB", 255), "text": "a"}])
    assert torch.equal(batch["pixel_values"], white["pixel_values"])


def test_lengths(processor):
    rows = pairs("a red dog is the color", "no")
    assert ImageTextCollator(processor, max_length=5)(rows)["input_ids"].shape == (2, 5)
    assert ImageTextCollator(processor)(pairs("dog " * 40))["input_ids"].shape == (1, 16)
    padded = ImageTextCollator(processor, padding="max_length", max_length=12)(rows)
    assert padded["input_ids"].shape == (2, 12)


def test_one_of_several_captions_is_drawn_by_torchs_generator(processor):
    rows = pairs(["red", "blue", "dog"])
    collator = ImageTextCollator(processor)

    def draws():
        torch.manual_seed(0)
        return [collator(rows)["input_ids"][0, 1].item() for _ in range(60)]

    first = draws()
    assert set(first) == {ID["red"], ID["blue"], ID["dog"]}
    assert draws() == first
    fixed = ImageTextCollator(processor, random_text=False)
    assert {fixed(rows)["input_ids"][0, 1].item() for _ in range(10)} == {ID["red"]}
    state = torch.get_rng_state()
    collator(pairs("red", ["blue"]))  # nothing to draw
    assert torch.equal(torch.get_rng_state(), state)


def test_return_loss_is_for_models_that_take_it(processor):
    rows, clip, blip = pairs("a", "no"), FAMILIES["clip"].build(), FAMILIES["blip_retrieval"].build()
    assert ImageTextCollator(processor, return_loss=True)(rows)["return_loss"] is True
    assert "return_loss" not in ImageTextCollator(processor, return_loss=False, model=clip)(rows)
    assert "return_loss" not in ImageTextCollator(processor, model=blip)(rows)
    peft = get_peft_model(FAMILIES["clip"].build(), LoraConfig(target_modules="all-linear"))
    for model in (clip, peft):
        collator = ImageTextCollator(processor, model=model)
        batch = collator(rows)
        assert batch["return_loss"] is True
        assert model(**batch).loss > 0
        assert pickle.loads(pickle.dumps(collator)).return_loss is True
    with pytest.raises(ValueError, match=r"BlipForImageTextRetrieval.*takes no return_loss"):
        ImageTextCollator(processor, return_loss=True, model=blip)


def test_ids(processor):
    rows = [{**row, "concept": i} for row, i in zip(pairs("a", "no"), (7, 3), strict=True)]
    batch = ImageTextCollator(processor, id_column="concept")(rows)
    assert torch.equal(batch["ids"], torch.tensor([7, 3]))
    assert "labels" in ImageTextCollator(processor, id_column="concept", id_name="labels")(rows)
    with pytest.raises(TypeError, match="Row 0: column 'image' holds no id"):
        ImageTextCollator(processor, id_column="image")(rows)


def test_clip_trains_on_a_dataset_under_the_stock_trainer(processor, tmp_path):
    rows = pairs("red dog", "blue cat", "two", "no color")
    data = datasets.Dataset.from_dict(
        {"image": [row["image"] for row in rows], "text": [row["text"] for row in rows]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    model = get_peft_model(FAMILIES["clip"].build(), LoraConfig(target_modules="all-linear"))
    args = hf.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    collator = ImageTextCollator(processor, model=model)
    trainer = hf.Trainer(model, args, data_collator=collator, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"image": image()}, ValueError, r"no column 'text' but \['image'\].*remove_unused_columns=False"),
        ({"text": "a"}, ValueError, "no column 'image'"),
        ({"image": image(), "text": ""}, ValueError, "Row 0: the text in column 'text' is empty"),
        ({"image": image(), "text": " \n"}, ValueError, "is empty"),
        ({"image": image(), "text": []}, ValueError, "list in column 'text' is empty"),
        ({"image": image(), "text": ["", ""]}, ValueError, "is empty"),
        ({"image": image(), "text": None}, TypeError, "holds NoneType, not a string"),
        ({"image": "cat.png", "text": "a"}, ValueError, "the path 'cat.png', which can't be read"),
        ({"image": None, "text": "a"}, TypeError, "holds NoneType, not an image"),
    ],
)
def test_bad_rows(processor, row, error, message):
    with pytest.raises(error, match=message):
        ImageTextCollator(processor)([row])


# ------------------------------------------------------------------------------------------------ question and answer

EQUAL = ["is the cat red", "what color is a", "is a dog red"]


def questions(*answers):
    asked = ["what color is the dog", "is the cat red", "what is a dog"]
    return [{"image": image(shade=60 * i), "question": asked[i], "answer": answer} for i, answer in enumerate(answers)]


def test_answers(processor):
    batch = QuestionAnswerCollator(processor, decoder_start_token_id=START)(questions("red", "yes a cat"))
    assert batch["input_ids"].shape == (2, 7)
    red, yes, a, cat = (ID[word] for word in ("red", "yes", "a", "cat"))
    assert batch["decoder_input_ids"].tolist() == [[START, red, SEP, PAD, PAD], [START, yes, a, cat, SEP]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[START, red, SEP, -100, -100], [START, yes, a, cat, SEP]]


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_loss_is_the_one_calculated_by_hand(processor, wrapped):
    """Each answer by itself, without padding, token by token through the parts of the model.

    The questions are equally long: the model's decoder reads their padding.
    """
    model = FAMILIES["blip_vqa"].build()
    base = model
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["query", "value"], init_lora_weights=False)).eval()
    collator = QuestionAnswerCollator(processor, model=model)
    assert collator.decoder_start_token_id == START
    rows = [{**row, "question": q} for row, q in zip(questions("red", "yes a cat", "two dog"), EQUAL, strict=True)]
    batch = collator(rows)
    with torch.no_grad():
        loss = model(**batch).loss
        total, count = 0.0, 0
        for row in rows:
            inputs = processor(images=row["image"], text=row["question"], return_tensors="pt")
            image = base.vision_model(inputs["pixel_values"]).last_hidden_state
            question = base.text_encoder(inputs["input_ids"], encoder_hidden_states=image).last_hidden_state
            tokens = [START, *(ID[word] for word in row["answer"].split()), SEP]
            for n in range(1, len(tokens)):
                decoded = base.text_decoder(torch.tensor([tokens[:n]]), encoder_hidden_states=question)
                total -= decoded.logits[0, -1].log_softmax(-1)[tokens[n]].item()
                count += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-4)


def test_generate_starts_from_the_same_token(processor):
    """An answer that was learned by heart is what generate gives back."""
    model = FAMILIES["blip_vqa"].build().train()
    rows = questions("red", "yes a cat")
    batch = QuestionAnswerCollator(processor, model=model)(rows)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for row in rows:  # alone: its generate attends to the padding of questions
        question = QuestionAnswerCollator(processor, answer_column=None)([row])
        assert set(question) == {"pixel_values", "input_ids", "attention_mask"}
        tokens = model.eval().generate(**question, max_new_tokens=6)
        assert processor.tokenizer.decode(tokens[0][1:], skip_special_tokens=True) == row["answer"]


def test_with_constant_padding_an_answer_does_not_depend_on_its_batch(processor):
    model = FAMILIES["blip_vqa"].build()
    collator = QuestionAnswerCollator(processor, model=model, padding="max_length", max_length=10)
    rows = questions("red", "yes", "no")
    with torch.no_grad():
        together, alone = model(**collator(rows)).loss, [model(**collator([row])).loss for row in rows]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_eval_loss_of_answers_under_the_stock_trainer(processor, tmp_path):
    model = get_peft_model(FAMILIES["blip_vqa"].build(), LoraConfig(target_modules=["query", "value"]))
    args = hf.TrainingArguments(str(tmp_path), remove_unused_columns=False, report_to="none", use_cpu=True)
    collator, rows = QuestionAnswerCollator(processor, model=model), questions("red", "yes a cat", "no")
    trainer = hf.Trainer(model, args, data_collator=collator, eval_dataset=rows)
    with torch.no_grad():
        expected = model(**collator(rows)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_one_of_several_answers_is_drawn(processor):
    rows = questions(["red", "blue"])
    collator = QuestionAnswerCollator(processor, decoder_start_token_id=START)
    torch.manual_seed(0)
    assert {collator(rows)["labels"][0, 1].item() for _ in range(30)} == {ID["red"], ID["blue"]}
    collator.random_answer = False
    assert {collator(rows)["labels"][0, 1].item() for _ in range(10)} == {ID["red"]}


def test_the_start_token_is_needed(processor):
    with pytest.raises(ValueError, match="decoder_start_token_id="):
        QuestionAnswerCollator(processor)
    with pytest.raises(ValueError, match="no column 'answer'"):
        QuestionAnswerCollator(processor, decoder_start_token_id=START)([{"image": image(), "question": "what"}])
