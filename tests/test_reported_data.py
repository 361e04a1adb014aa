"""What people reported about data: images, captions, lengths, ids and languages, as the users did it."""

from __future__ import annotations

import io
import struct

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from peft_multimodal import (
    ContrastiveTrainer,
    CrossLingualAdapterConfig,
    CrossLingualTrainer,
    HardSampleBank,
    ImageTextCollator,
    InterleavedProcessor,
    LanguageProcessor,
    QuestionAnswerCollator,
)
from peft_multimodal.data import FiniteBatches, evaluating
from peft_multimodal.evaluation import compute_embeddings, retrieval_recall
from peft_multimodal.images import read_image
from peft_multimodal.training.hard_samples import SampleIds
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
    with pytest.raises(ValueError, match=r"Row 1 \(id 'row-1'\): the text in column 'text' is empty"):
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


# -------------------------------------------------------------------------------------------------------------- images

RAMP = np.linspace(0, 65535, 256).reshape(16, 16)
GREY16 = RAMP.astype(np.uint16)
RED = Image.new("RGB", (4, 4), "red").quantize(2)  # of palette colours


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(size=(12, 8)) -> Image.Image:
    """Another colour in each corner."""
    image = Image.new("RGB", size)
    for x in range(size[0]):
        for y in range(size[1]):
            image.putpixel((x, y), (20 * x, 30 * y, 100))
    return image


def pixels(image: Image.Image) -> list:
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBa", "La"]
)
def test_every_mode_of_8_bits_is_what_a_viewer_shows(mode):
    shade = Image.new("L", (4, 4), 255 if mode == "1" else 90)
    rgb = shade.convert("RGB")
    paths = {"La": shade.convert("LA"), "RGBa": rgb.convert("RGBA"), "P": rgb.quantize(4), "PA": rgb.quantize(4)}
    given = paths.get(mode, rgb).convert(mode)
    assert np.abs(np.asarray(read_image(given)).astype(int) - np.asarray(shade)[..., None]).max() <= 2


@pytest.mark.parametrize(
    "image",
    [
        Image.merge("RGBA", (*Image.new("RGB", (4, 4), "red").split(), Image.new("L", (4, 4), 0))),
        Image.new("LA", (4, 4), (0, 0)),
        Image.open(io.BytesIO(encoded(RED, transparency=RED.getpixel((0, 0))))),
        Image.open(io.BytesIO(encoded(Image.new("L", (4, 4), 7), transparency=7))),
        np.zeros((4, 4, 4), np.uint8),
        torch.zeros(4, 8, 8, dtype=torch.uint8),
    ],
)
def test_what_is_transparent_lies_on_white(image):
    assert set(np.asarray(read_image(image)).ravel().tolist()) == {255}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("form", ["PIL", "png", "array", "tensor"])
def test_16_bits_of_grey_keep_their_levels(form, order, processor):
    mode = "I;16" if order == "<" else "I;16B"
    image = Image.frombytes(mode, (16, 16), GREY16.astype(f"{order}u2").tobytes())
    given = {
        "PIL": image,
        "png": encoded(image),
        "array": GREY16.astype(f"{order}u2"),
        "tensor": torch.from_numpy(GREY16),
    }[form]
    assert np.asarray(read_image(given))[..., 0].ravel().tolist() == list(range(256))
    batch = ImageTextCollator(processor)([{"image": given, "text": "w1"}])
    assert len(batch["pixel_values"][0, 0].unique()) == 256


def test_12_bits_in_16_are_warned_of():
    with pytest.warns(UserWarning, match="12 bits"):
        read_image(Image.fromarray((RAMP / 16).astype(np.uint16)))


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (Image.fromarray(RAMP.astype(np.int32)), "mode 'I'"),
        (Image.fromarray(RAMP.astype(np.float32)), "mode 'F'"),
        (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "mode 'F'"),
        (RAMP, "dtype float64"),
        (torch.rand(3, 8, 8), "dtype float32"),
        (torch.rand(3, 8, 8).bfloat16(), "dtype bfloat16"),
        (np.zeros((8, 8), np.int64), "dtype int64"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"shape \(2, 3, 8, 8\)"),
        (np.zeros((7, 8, 9), np.uint8), r"shape \(7, 8, 9\)"),
        (np.zeros((0, 8, 3), np.uint8), "without pixels"),
        (Image.new("RGB", (0, 3)), "without pixels"),
        (encoded(photo())[:-30], "can't be read|are no image"),
        (b"no image", "bytes that are no image"),
        (b"", "bytes that are no image"),
        ("nowhere.png", "the path 'nowhere.png', which can't be read"),
        ("https://example.org/a.png", "URL.*download"),
        ({"bytes": None, "path": None}, "both are None"),
        ({"url": "x"}, r"dictionary of \['url'\]"),
        (None, "NoneType, not an image"),
        (7, "int, not an image"),
        ([photo()], "list, not an image"),
    ],
)
def test_what_is_no_image_is_refused_with_its_row(image, named, processor):
    """By every collator and processor, inside a check for NaN, and by the id that the training goes by."""
    good = {"id": "good", "key": 1, "image": photo(), "text": "w1", "question": "w1", "answer": "w2"}
    rows = [good, {**good, "id": "x-ray", "key": np.int64(77), "image": image}]
    errors = (TypeError, ValueError)
    for collator in (ImageTextCollator(processor), QuestionAnswerCollator(processor, decoder_start_token_id=START)):
        with pytest.raises(errors, match=f"(?s)Row 1 \\(id 'x-ray'\\): column 'image' .*({named})"):
            collator(rows)
        with pytest.raises(errors, match=f"(?s)Row 1 .*({named}).*Its key is 77"):
            FiniteBatches(collator, "key")(rows)
    with pytest.raises(errors, match=r"Row 1 \(key 77\)"):
        ImageTextCollator(processor, id_column="key")(rows)
    with pytest.raises(errors, match="Its key is 77"):
        SampleIds(ImageTextCollator(processor), "key")(rows)


def test_a_broken_image_is_named_from_a_loaders_worker(processor):
    rows = [{"id": i, "image": encoded(photo()), "text": "w1"} for i in range(4)]
    rows[2]["image"] = rows[2]["image"][:-30]
    loader = torch.utils.data.DataLoader(rows, 4, collate_fn=FiniteBatches(ImageTextCollator(processor)), num_workers=1)
    with pytest.raises(ValueError, match=r"Row 2 \(id 2\): column 'image'"):
        next(iter(loader))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_datasets(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(), exif=exif)
    (tmp_path / "a.png").write_bytes(content)
    stored = {"bytes": content, "path": None}
    right = pixels(datasets.Image().decode_example(stored))
    forms = [Image.open(io.BytesIO(content)), content, stored, {"path": str(tmp_path / "a.png"), "bytes": None}]
    forms += [str(tmp_path / "a.png"), tmp_path / "a.png", datasets.Image().decode_example(stored)]
    assert all(pixels(read_image(form)) == right for form in forms)


def test_a_data_set_in_any_format_gives_the_same_batch(processor):
    data = datasets.Dataset.from_dict(
        {"image": [photo(), photo((8, 12))], "text": ["w1", "w2 w3"]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    collator = ImageTextCollator(processor)
    right = collator([data[0], data[1]])["pixel_values"]
    undecoded = data.cast_column("image", datasets.Image(decode=False))
    for other in (undecoded, data.with_format("numpy"), data.with_format("torch")):
        assert torch.equal(collator([other[0], other[1]])["pixel_values"], right)


def tiff(*entries: bytes) -> bytes:
    """EXIF data of these entries of 12 bytes."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


TURNED = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
BROKEN_METADATA = {
    "garbage": (b"Exif\0\0garbage", False),
    "cut off": (b"Exif\0\0II*\0", False),
    "text for a number": (tiff(TURNED, struct.pack("<HHI4s", 0x0100, 2, 4, b"abc")), True),
    "negative": (tiff(TURNED, struct.pack("<HHIi", 0x0101, 9, 1, -5)), True),
}


@pytest.mark.parametrize("name", BROKEN_METADATA)
def test_broken_metadata_does_not_make_an_image_unreadable(name: str):
    metadata, turned = BROKEN_METADATA[name]
    file = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(file, "PNG", exif=metadata)
    image = read_image(file.getvalue())
    assert image.size == ((4, 8) if turned else (8, 4))
    assert read_image(image).size == image.size, "it is turned once"


def test_an_error_that_is_not_made_of_a_message_comes_through():
    def refuse(rows):
        error = UnicodeDecodeError("utf8", b"x", 0, 1, "bad")
        error.row = 0
        raise error

    with pytest.raises(UnicodeDecodeError, match="bad"):
        FiniteBatches(refuse)([{"id": 5}])


# ----------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("ids", [[3, 8, 3], [np.int64(3), np.int64(8), np.int64(3)], list(torch.tensor([3, 8, 3]))])
def test_integer_ids_of_any_library_are_the_same(ids, processor):
    rows = [{**row, "id": i} for row, i in zip(captioned(3), ids, strict=True)]
    assert ImageTextCollator(processor, id_column="id")(rows)["ids"].tolist() == [3, 8, 3]
    assert SampleIds(ImageTextCollator(processor), "id", "id")(rows)["image_ids"].tolist() == [3, 8, 3]


def test_ids_may_be_strings_everywhere(processor):
    rows = [{**row, "id": i} for row, i in zip(captioned(3), ["a", "b", "a"], strict=True)]
    ids = ImageTextCollator(processor, id_column="id")(rows)["ids"]
    assert (ids[0] == ids[2], ids[0] == ids[1]) == (True, False)
    assert torch.equal(ids, SampleIds(ImageTextCollator(processor), "id")(rows)["sample_ids"])


@pytest.mark.parametrize("bad", [1.5, None, True, np.float32(2), torch.tensor(0.5), torch.tensor([1])])
def test_what_is_no_id_is_refused_with_its_row(bad, processor):
    rows = [{**row, "key": i} for row, i in zip(captioned(2), [1, bad], strict=True)]
    for collator in (ImageTextCollator(processor, id_column="key"), SampleIds(ImageTextCollator(processor), "key")):
        with pytest.raises(TypeError, match=r"Row 1 .*column 'key' holds no id"):
            collator(rows)


def test_a_bank_of_rows_of_unequal_length_says_who_can_pad_them():
    rows = [{"id": i, "input_ids": torch.arange(4 + i % 2), "pixel_values": torch.randn(3, 16, 16)} for i in range(4)]
    with pytest.raises(ValueError, match=r"'input_ids' has shape \(\d,\) in Row 0 .*collator that pads"):
        HardSampleBank.from_model(FAMILIES["clip"].build(), rows, progress=False)


# ------------------------------------------------------------------------------------------------------------- columns


def test_a_column_of_another_name_is_told_how_to_choose_it(processor):
    row = {"image": photo(), "caption": "w1", "question": "w1", "answer": "w1"}
    with pytest.raises(
        ValueError, match=r"no column 'text' but \[.*'caption'.*text_column=.*remove_unused_columns=False"
    ):
        ImageTextCollator(processor)([row])
    with pytest.raises(ValueError, match=r"no column 'photo'.*image_column="):
        ImageTextCollator(processor, image_column="photo")([{**row, "text": "w1"}])
    with pytest.raises(ValueError, match=r"no column 'reply'.*answer_column="):
        QuestionAnswerCollator(processor, answer_column="reply", decoder_start_token_id=START)([row])


# ------------------------------------------------------------------------------------- images between words, languages


def word_tokenizer(
    limit: int | None = None, extra: tuple[str, ...] = (), letter: str = "w"
) -> hf.PreTrainedTokenizerFast:
    """Knows [PAD], [EOS] and the words w0, w1, ...; says nothing of the longest text unless `limit` is given."""
    words = ["[PAD]", "[EOS]", "[UNK]", *extra, *(f"{letter}{i}" for i in range(40))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    limits = {} if limit is None else {"model_max_length": limit}
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "eos", "unk")}
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **special, **limits)


def interleaved(**options) -> InterleavedProcessor:
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return InterleavedProcessor(word_tokenizer(extra=("<image>",)), images, **options)


def test_an_interleaved_processor_reads_what_the_collators_read(tmp_path):
    photo().save(tmp_path / "a.png")
    content = encoded(photo())
    forms = [photo(), content, {"bytes": content, "path": None}, str(tmp_path / "a.png"), tmp_path / "a.png"]
    forms += [np.asarray(photo()), torch.from_numpy(np.asarray(photo()).copy()).permute(2, 0, 1)]
    batch = interleaved().collate([{"text": "<image> w1", "images": [form]} for form in forms])
    assert batch["pixel_values"].shape == (len(forms), 1, 3, 8, 8)
    assert (batch["pixel_values"] == batch["pixel_values"][:1]).all()
    video = interleaved()(["<image> w1"] * 2, [[[photo(), content]], [np.stack([np.asarray(photo())] * 2)]])
    assert video["frame_mask"].all()
    assert (video["pixel_values"] == batch["pixel_values"][0, 0]).all()
    assert "pixel_values" not in interleaved().collate([{"text": "w1", "images": None}])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([None], "image 0 holds NoneType, not an image"),
        ([7], "image 0 holds int"),
        ([Image.fromarray(RAMP.astype(np.float32))], "mode 'F'"),
        ([encoded(photo())[:-30]], "image 0 holds"),
        ([[photo(), None]], "image 0 holds NoneType"),
        ([[]], "video 0 has no frames"),
        ([], "1 markers '<image>' but 0 images"),
        (None, "1 markers '<image>' but 0 images"),
        (photo(), "a list of images for each text"),
        ({"bytes": encoded(photo()), "path": None}, "a list of images for each text"),
    ],
)
def test_an_interleaved_processor_names_the_row(images, message):
    rows = [
        {"id": "good", "text": "<image> w1", "images": [photo()]},
        {"id": "x-ray", "text": "<image> w1", "images": images},
    ]
    with pytest.raises((TypeError, ValueError), match=f"Row 1.*{message}.*Its id is 'x-ray'"):
        interleaved().collate(rows)
    with pytest.raises(ValueError, match=r"no column 'text' but \['caption'.*text_column="):
        interleaved().collate([{"caption": "w1", "images": []}])


def test_a_language_processor_reads_what_the_collators_read():
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LanguageProcessor(en=word_tokenizer(), image_processor=images)
    right = processor(images=photo())["pixel_values"]
    both = processor(images=[encoded(photo()), {"bytes": encoded(photo()), "path": None}])["pixel_values"]
    assert torch.equal(both, right.repeat(2, 1, 1, 1))
    assert len(processor(images=GREY16)["pixel_values"].unique()) > 20
    with pytest.raises(TypeError, match="Image 1 holds NoneType"):
        processor(images=[photo(), None])


LANGUAGES = ("de", "fr")


def language_encoder(seed: int, **options) -> hf.BertModel:
    config = hf.BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        max_position_embeddings=12, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    return hf.BertModel(config)


@pytest.fixture(scope="module")
def languages():
    """CLIP that reads German and French too, and its processor; each language's tokenizer knows any number of tokens."""
    made = {"bottleneck_dim": 16, "num_heads": 2}
    configs = [CrossLingualAdapterConfig(**made).with_encoder(language_encoder(i)) for i in range(2)]
    model = get_peft_model(FAMILIES["clip"].build(), configs[0], adapter_name="de")
    model.add_adapter("fr", configs[1])
    tokenizers = {name: word_tokenizer(letter=letter) for name, letter in zip(("en", *LANGUAGES), "wdf", strict=True)}
    return model.eval(), LanguageProcessor(**tokenizers)


def text_features(model, inputs):
    with torch.no_grad():
        return model.get_text_features(**inputs).pooler_output


@pytest.mark.parametrize("active", LANGUAGES)
def test_a_text_goes_through_its_own_language_whatever_is_active(languages, active):
    model, processor = languages
    texts = {"en": ["w1 w2", "w3"], "de": ["d1 d2", "d3"], "fr": ["f1 f2", "f3"]}
    with model.disable_adapter():
        right = {"en": text_features(model, processor(texts["en"]))}
    for name in LANGUAGES:
        model.set_adapter(name)
        plain = {k: v for k, v in processor(texts[name], language=name).items() if k != "adapter_names"}
        right[name] = text_features(model, plain)
    model.set_adapter(active)
    for name, expected in right.items():
        inputs = processor(texts[name], language=name)
        assert torch.equal(text_features(model, inputs), expected)
        pixel_values = FAMILIES["clip"].inputs()["pixel_values"]
        with torch.no_grad():
            forward = model(**inputs, pixel_values=pixel_values).text_embeds
        torch.testing.assert_close(forward, torch.nn.functional.normalize(expected, dim=-1))
        torch.testing.assert_close(text_features(model, processor(texts[name], language=[name] * 2)), expected)
        # ... and where a whole set is embedded.
        rows = [{"words": text} for text in texts[name]]
        collate = lambda rows, name=name: processor([row["words"] for row in rows], language=name)  # noqa: E731
        embeds = compute_embeddings(model, rows, collate, progress=False)["text_embeds"]
        torch.testing.assert_close(embeds, torch.nn.functional.normalize(expected, dim=-1))
    assert torch.equal(text_features(model, processor(texts["en"])), right["en"])


def test_a_language_that_the_model_does_not_have_is_named(languages):
    model, processor = languages
    more = LanguageProcessor(**processor.tokenizers, it=word_tokenizer(letter="i"))
    with pytest.raises(ValueError, match=r"No adapter for \['it'\].*called as its adapter"):
        model.get_text_features(**more(["i1"], language="it"))
    with pytest.raises(ValueError, match=r"No adapter for \['it'\]"):
        model(**more(["i1"] * 3, language="it"), pixel_values=FAMILIES["clip"].inputs()["pixel_values"])
    with model.disable_adapter(), pytest.raises(ValueError, match=r"\['de'\] came while the adapters are disabled"):
        model.get_text_features(**processor(["d1"], language="de"))


def test_a_processor_that_was_saved_carries_the_language_too(languages, tmp_path):
    model, processor = languages
    processor.save_pretrained(tmp_path)
    inputs = LanguageProcessor.from_pretrained(tmp_path)(["d1"], language="de")
    assert inputs["adapter_names"] == ["de"]
    assert torch.equal(text_features(model, inputs), text_features(model, processor(["d1"], language="de")))


# ------------------------------------------------------------------------------------------------------------- lengths

LONG = " ".join(f"w{i % 30}" for i in range(150))


def tiny_clip(**text):
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = hf.CLIPVisionConfig(**tiny, image_size=16, patch_size=8)
    return hf.CLIPModel(
        hf.CLIPConfig(
            text_config=hf.CLIPTextConfig(**{**tiny, "vocab_size": 64, "eos_token_id": 1, **text}),
            vision_config=vision,
            projection_dim=8,
        )
    )


def unlimited_processor() -> hf.CLIPProcessor:
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return hf.CLIPProcessor(images, word_tokenizer())


def decoder(name: str) -> hf.PreTrainedModel:
    tiny = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "pad_token_id": 0}
    configs = {
        "gpt2": hf.GPT2Config(
            vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=20, bos_token_id=1, eos_token_id=1
        ),
        "opt": hf.OPTConfig(**tiny, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=20),
        "llama": hf.LlamaConfig(**tiny, intermediate_size=16, max_position_embeddings=20),
    }
    return hf.AutoModelForCausalLM.from_config(configs[name])


def test_captions_are_cut_to_what_the_model_reads():
    model = tiny_clip(max_position_embeddings=21)
    batch = ImageTextCollator(unlimited_processor(), model=model)([{"image": photo(), "text": LONG}] * 2)
    assert batch["input_ids"].shape == (2, 21)
    assert model(**batch).loss > 0
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert ImageTextCollator(unlimited_processor(), model=wrapped).max_length == 21
    assert ImageTextCollator(make_processor(16), model=model).max_length == 16
    with pytest.raises(ValueError, match="77 tokens was asked for, but the model reads 21"):
        ImageTextCollator(unlimited_processor(), model=model, max_length=77)


def test_questions_and_answers_are_cut_to_what_the_model_reads():
    model, processor = FAMILIES["blip_vqa"].build(), make_processor(int(1e30))
    row = {"image": photo(), "question": LONG, "answer": LONG}
    batch = QuestionAnswerCollator(processor, model=model)([row])
    assert (batch["input_ids"].shape, batch["decoder_input_ids"].shape) == ((1, 64), (1, 64))
    assert model(**batch).loss > 0
    short = QuestionAnswerCollator(make_processor(16), decoder_start_token_id=START, max_answer_length=5)([row])
    assert (short["input_ids"].shape, short["labels"].shape) == ((1, 16), (1, 5))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_interleaved_texts_are_cut_to_what_the_decoder_reads(name):
    model = decoder(name)
    processor = interleaved(model=model)
    batch = processor.collate(
        [{"text": f"<image> {LONG} <image>", "images": [photo(), photo()]}, {"text": "w1", "images": []}]
    )
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 20)
    assert batch["pixel_values"].shape[:2] == (2, 1)  # the image whose marker was cut off is left out
    assert model(input_ids=batch["input_ids"] % 64, attention_mask=batch["attention_mask"]).logits.isfinite().all()
    assert interleaved(max_length=7).collate([{"text": LONG, "images": []}])["labels"].shape == (1, 7)
    with pytest.raises(ValueError, match="30 tokens was asked for, but the model reads 20"):
        interleaved(model=model, max_length=30)


def test_a_saved_interleaved_processor_keeps_its_limit(tmp_path):
    interleaved(model=decoder("gpt2")).save_pretrained(tmp_path)
    assert InterleavedProcessor.from_pretrained(tmp_path).collate([{"text": LONG, "images": []}])["labels"].shape == (
        1,
        20,
    )


@pytest.mark.parametrize("offset", [False, True])
def test_languages_are_cut_to_what_their_encoders_read(offset, tmp_path):
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = language_encoder(0)
    if offset:  # counts its positions from behind the padding's
        encoder = hf.XLMRobertaModel(
            hf.XLMRobertaConfig(**tiny, vocab_size=64, max_position_embeddings=12, pad_token_id=1)
        )
    config = CrossLingualAdapterConfig(bottleneck_dim=16, num_heads=2).with_encoder(encoder)
    model = get_peft_model(tiny_clip(max_position_embeddings=21), config, adapter_name="de").eval()
    processor = LanguageProcessor(en=word_tokenizer(), de=word_tokenizer(), model=model)
    processor.save_pretrained(tmp_path)
    limit = 10 if offset else 12
    for made in (processor, LanguageProcessor.from_pretrained(tmp_path)):
        assert made([LONG])["input_ids"].shape == (1, 21)
        assert made([LONG], language="de")["input_ids"].shape == (1, limit)
        assert text_features(model, made([LONG, "w1"], language=["de", "en"])).isfinite().all()
    # The trainer knows its model.
    args = hf.TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    pairs = [{"source": LONG, "target": f"{LONG} w{i}"} for i in range(3)] + [{"source": "w1", "target": "w2"}]
    unfitted = LanguageProcessor(en=word_tokenizer(), de=word_tokenizer())
    CrossLingualTrainer(model, args, train_dataset=pairs, processing_class=unfitted, cache=False).train()


# --------------------------------------------------------------------------------------------- padding that is read


def test_siglips_features_do_not_depend_on_the_batch():
    model, processor = FAMILIES["siglip"].build(), unlimited_processor()
    rows = [{"image": photo(), "text": text} for text in ("w1", "w2 w3 w4", LONG)]
    collator = ImageTextCollator(processor, model=model)
    assert collator(rows[:1])["input_ids"].shape == (1, 64)
    together, alone = (
        compute_embeddings(model, rows, collator, batch_size=size, progress=False)["text_embeds"] for size in (3, 1)
    )
    torch.testing.assert_close(together, alone)
    languages = LanguageProcessor(en=word_tokenizer(), model=model)
    assert languages(["w1"])["input_ids"].shape == (1, 64)
    assert ImageTextCollator(processor, model=model, padding=True)(rows[:1])["input_ids"].shape[1] < 64  # on request


def test_our_trainers_tell_the_collator_their_model(tmp_path):
    """A SigLIP's texts are padded to its length, and no text is longer than the tower reads; what was told stays."""
    args = hf.TrainingArguments(str(tmp_path), per_device_train_batch_size=2, report_to=[], use_cpu=True)
    rows = [{"id": i, "image": photo(), "text": text} for i, text in enumerate(("w1", "w2 w3 w4", LONG))]

    def shape(name: str, **options) -> torch.Size:
        model = FAMILIES[name].build()
        given = ImageTextCollator(unlimited_processor(), **options)
        trainer = ContrastiveTrainer(model, args, train_dataset=rows, data_collator=given)
        assert given.fitted(model) is not given  # the user's own is as it was
        return trainer.data_collator(rows[: 1 if name == "siglip" else 3])["input_ids"].shape

    assert shape("siglip") == (1, 64)
    assert shape("siglip", padding=True)[1] < 64
    assert shape("clip")[1] == 64
    assert shape("clip", max_length=9)[1] == 9


@pytest.mark.parametrize(
    "name", ["clip", "chinese_clip", "altclip", "vision_text_dual_encoder", "flava", "blip_retrieval"]
)
def test_other_towers_are_padded_to_the_longest(name):
    assert ImageTextCollator(unlimited_processor(), model=FAMILIES[name].build()).padding is True


def test_asking_a_model_leaves_it_as_it_was():
    model = get_peft_model(FAMILIES["siglip"].build(), LoraConfig(target_modules=["q_proj"])).train()
    model.set_requires_grad("default", False)
    before = [p.requires_grad for p in model.parameters()]
    assert ImageTextCollator(unlimited_processor(), model=model).padding == "max_length"
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(module.training for module in model.modules())
    assert model.active_adapters == ["default"]


# ------------------------------------------------------------------------------------------- a collator without a model


def test_a_collator_that_was_not_told_the_model_says_so_before_trainer_stops(tmp_path):
    args = hf.TrainingArguments(
        str(tmp_path), max_steps=1, remove_unused_columns=False, report_to="none", use_cpu=True, save_strategy="no"
    )
    rows = [{"id": i, "image": photo(), "text": f"w{i}"} for i in range(4)]
    model = get_peft_model(FAMILIES["clip"].build(), LoraConfig(target_modules=["q_proj"]))
    trainer = hf.Trainer(model, args, data_collator=ImageTextCollator(unlimited_processor()), train_dataset=rows)
    with (
        pytest.warns(UserWarning, match="no return_loss.*Pass model=model"),
        pytest.raises(ValueError, match="return a loss"),
    ):
        trainer.train()


def test_who_needs_no_loss_of_the_model_is_not_warned(tmp_path, recwarn):
    rows = [{"id": i, "image": photo(), "text": f"w{i}"} for i in range(4)]
    model = get_peft_model(FAMILIES["clip"].build(), LoraConfig(target_modules=["q_proj"]))
    args = hf.TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    collator = ImageTextCollator(unlimited_processor(), max_length=16)
    for given in (collator, FiniteBatches(collator)):
        HardSampleBank.from_model(model, rows, collator=given, progress=False)
        compute_embeddings(model, rows, given, progress=False)
        ContrastiveTrainer(model, args, given, rows).train()
    ImageTextCollator(unlimited_processor(), return_loss=False)(rows)
    assert not [w for w in recwarn if "return_loss" in str(w.message)]
    assert collator.return_loss is None


def test_ids_as_labels_are_for_a_function_that_computes_the_loss(recwarn):
    rows = [{"id": i, "image": photo(), "text": f"w{i}"} for i in range(4)]
    collator = ImageTextCollator(unlimited_processor(), id_column="id", id_name="labels", max_length=16)
    assert "return_loss" not in collator(rows)
    assert not [w for w in recwarn if "return_loss" in str(w.message)]


def test_a_collator_asks_the_model_inside_a_wrapper():
    for wrapped in (torch.compile(FAMILIES["clip"].build()), torch.nn.DataParallel(FAMILIES["clip"].build())):
        assert ImageTextCollator(unlimited_processor(), model=wrapped).return_loss is True


@pytest.mark.parametrize(
    "call",
    [
        lambda: ImageTextCollator(make_processor())([]),
        lambda: QuestionAnswerCollator(make_processor(), decoder_start_token_id=1)([]),
        lambda: interleaved()([]),
        lambda: interleaved().collate([]),
        lambda: LanguageProcessor(en=word_tokenizer())([]),
        lambda: LanguageProcessor(en=word_tokenizer())([], language=[]),
    ],
    ids=["image and text", "question and answer", "interleaved", "collate", "language", "languages"],
)
def test_an_empty_batch_is_called_so(call):
    with pytest.raises(ValueError, match="The batch is empty"):
        call()
