"""LanguageProcessor with tokenizers that differ in all that tokenizers differ in, on tiny dual encoders."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import transformers as hf
from families import FAMILIES, text_tower, tiny
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from peft_multimodal import CrossLingualAdapterConfig
from peft_multimodal.data import LanguageProcessor

EN = {"pad": 1, "bos": 0, "eos": 63, "words": range(4, 60), "limit": 16}  # CLIP reads the text at its greatest id
ZH = {"pad": 5, "bos": 7, "eos": 3, "words": range(8, 40), "limit": 10}
JA = {"pad": 9, "bos": None, "eos": 2, "words": range(10, 30), "limit": None}
WIDTH = 28


def tokenizer(letter, pad, bos, eos, words, limit=None, inputs=("input_ids", "attention_mask"), **options):
    """Knows the words <letter>0, <letter>1, ...; a text is [bos] words [eos]."""
    vocabulary = {"[PAD]": pad, "[EOS]": eos, **{f"{letter}{i}": word for i, word in enumerate(words)}}
    vocabulary |= {} if bos is None else {"[BOS]": bos}
    vocabulary["[UNK]"] = min(set(range(64)) - set(vocabulary.values()))
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    frame = [(token, vocabulary[token]) for token in ("[BOS]", "[EOS]") if token in vocabulary]
    first = "" if bos is None else "[BOS] "
    made.post_processor = processors.TemplateProcessing(single=f"{first}$A [EOS]", special_tokens=frame)
    limits = {} if limit is None else {"model_max_length": limit}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[EOS]",
        **({} if bos is None else {"bos_token": "[BOS]"}),
        model_input_names=list(inputs),
        **limits,
        **options,
    )


def encoder(spec, seed=0):
    """A tiny BERT that reads what `tokenizer(letter, **spec)` writes."""
    size = max(spec["words"]) + 1
    config = hf.BertConfig(**text_tower(WIDTH, vocab_size=size, pad_token_id=spec["pad"], max_position_embeddings=24))
    module = tiny(hf.BertModel, config)()
    if seed:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def tokenizers(**changes):
    found = {"en": tokenizer("e", **EN), "zh": tokenizer("z", **ZH), "ja": tokenizer("j", **JA)}
    return {**found, **changes}


@pytest.fixture
def processor():
    return LanguageProcessor(**tokenizers())


def siglip_like(**changes):
    """Gives no mask, as SigLIP's: the tower reads the padding."""
    return tokenizer("e", **{**EN, "limit": 12, **changes}, inputs=["input_ids"])


@pytest.fixture(scope="module")
def two_languages():
    """CLIP with the adapters zh and ja."""
    made = {"bottleneck_dim": 16, "num_heads": 2}
    model = get_peft_model(
        FAMILIES["clip"].build(), CrossLingualAdapterConfig(**made).with_encoder(encoder(ZH)), adapter_name="zh"
    )
    model.add_adapter("ja", CrossLingualAdapterConfig(**made).with_encoder(encoder(JA, seed=1)))
    return model.eval()


# ------------------------------------------------------------------------------------------------------ one language


def test_each_language_has_its_tokens(processor):
    assert processor.base == "en"
    assert processor.languages == ["en", "zh", "ja"]
    batch = processor(["e0 e3", "e1"])
    assert set(batch) == {"input_ids", "attention_mask", "adapter_names"}
    assert batch["adapter_names"] == ["__base__"] * 2
    assert batch["input_ids"].tolist() == [[0, 4, 7, 63], [0, 5, 63, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    batch = processor(["z0 z3", "z1"], language="zh")
    assert batch["input_ids"].tolist() == [[7, 8, 11, 3], [7, 9, 3, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert processor("j2", language="ja")["input_ids"].tolist() == [[12, 2]]
    assert processor(("z0",), language="zh").input_ids.dtype == torch.long
    assert {k: v.tolist() for k, v in processor.tokenize(["z0"], "zh").items()} == {
        "input_ids": [[7, 8, 3]],
        "attention_mask": [[1, 1, 1]],
    }
    assert processor.batch_decode([[7, 8, 11, 3]], "zh", skip_special_tokens=True) == ["z0 z3"]
    assert processor.batch_decode(processor("e5")["input_ids"])[0].split()[1] == "e5"


def test_padding_and_limits_by_language():
    texts = {"en": "e1 " * 40, "zh": "z1 " * 40, "ja": "j1 " * 40}
    length = lambda p, name, text=None: p(text or texts[name], language=name)["input_ids"].shape[1]  # noqa: E731
    own = LanguageProcessor(**tokenizers())
    assert [length(own, name) for name in texts] == [16, 10, 41]  # ja has none: nothing is cut
    for_all = LanguageProcessor(**tokenizers(), max_length=6)
    assert [length(for_all, name) for name in texts] == [6, 6, 6]
    by_name = LanguageProcessor(**tokenizers(), max_length={"ja": 7, "en": 5})
    assert [length(by_name, name) for name in texts] == [5, 10, 7]
    padded = LanguageProcessor(**tokenizers(), padding={"en": "max_length"}, max_length={"zh": 8})
    assert [length(padded, name, f"{name[0]}0") for name in ("en", "zh")] == [16, 3]
    everywhere = LanguageProcessor(**tokenizers(), padding="max_length", max_length=9)
    batch = everywhere("z0", language="zh")
    assert batch["input_ids"].tolist() == [[7, 8, 3, 5, 5, 5, 5, 5, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0]]


def test_a_cut_text_keeps_its_end(processor):
    ids = processor("z1 " * 40, language="zh")["input_ids"][0]
    assert (ids[0], ids[-1]) == (ZH["bos"], ZH["eos"])


def test_a_tokenizer_without_mask_gets_ones():
    processor = LanguageProcessor(**tokenizers(en=siglip_like()), padding={"en": "max_length"})
    batch = processor(["e0", "e1 e2"])
    assert batch["input_ids"].shape == (2, 12)
    assert batch["attention_mask"].dtype == torch.long
    assert batch["attention_mask"].all()
    assert not processor(["z0", "z1 z2"], language="zh")["attention_mask"].all()
    model = FAMILIES["siglip"].build()
    with torch.no_grad():
        without = model.get_text_features(input_ids=batch["input_ids"]).pooler_output
        torch.testing.assert_close(model.get_text_features(**batch).pooler_output, without)


def test_token_type_ids_are_dropped():
    names = ["input_ids", "token_type_ids", "attention_mask"]
    processor = LanguageProcessor(**tokenizers(zh=tokenizer("z", **ZH, inputs=names)))
    assert "token_type_ids" in processor.tokenizer("zh")("z0")
    assert set(processor(["z0"], language="zh")) == {"input_ids", "attention_mask", "adapter_names"}
    assert set(processor(["z0", "e0"], language=["zh", "en"])) == {"input_ids", "attention_mask", "adapter_names"}


def test_images():
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LanguageProcessor(**tokenizers(), image_processor=images)
    image = Image.new("RGB", (20, 30), (200, 100, 0))
    both = processor(["z0"], images=image, language="zh")
    assert set(both) == {"input_ids", "attention_mask", "adapter_names", "pixel_values"}
    assert torch.equal(both["pixel_values"], images(image, return_tensors="pt")["pixel_values"])
    alone = processor(images=[image, image], do_rescale=False)
    assert set(alone) == {"pixel_values"}
    assert torch.equal(
        alone["pixel_values"], images([image] * 2, do_rescale=False, return_tensors="pt")["pixel_values"]
    )


# -------------------------------------------------------------------------------------------------- several languages

MIXED = (["e0 e3 e7", "z1", "j5 j2 j3 j4 j8", "z4 z2 z3", "e9"], ["en", "zh", "ja", "zh", "en"])


def test_mixed_batches_name_each_row(processor):
    batch = processor(*MIXED[:1], language=MIXED[1])
    assert batch["adapter_names"] == ["__base__", "zh", "ja", "zh", "__base__"]
    for text, language, ids, mask in zip(*MIXED, batch["input_ids"], batch["attention_mask"], strict=True):
        alone = processor(text, language=language)["input_ids"][0]
        assert torch.equal(ids[mask.bool()], alone)
    moved = batch.to("cpu")
    assert moved["adapter_names"] == batch["adapter_names"]
    assert processor("z0", language=["zh"])["adapter_names"] == ["zh"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_mixed_batches_are_their_single_rows(two_languages, side):
    made = tokenizers(zh=tokenizer("z", **ZH, padding_side=side), ja=tokenizer("j", **JA, padding_side=side))
    processor = LanguageProcessor(**made)
    with torch.no_grad():
        batch = processor(MIXED[0], language=MIXED[1])
        mixed = two_languages.get_text_features(**batch).pooler_output
        order = [3, 0, 4, 2, 1]
        batch = processor([MIXED[0][i] for i in order], language=[MIXED[1][i] for i in order])
        torch.testing.assert_close(two_languages.get_text_features(**batch).pooler_output, mixed[order])
        for language in ("en", "zh", "ja"):
            rows = [i for i, name in enumerate(MIXED[1]) if name == language]
            # Left padding moves the encoder's positions, thus only the whole language's batch is the same.
            for part in [rows] if side == "left" else [rows, *([row] for row in rows)]:
                inputs = processor([MIXED[0][i] for i in part], language=language)
                if language == "en":
                    with two_languages.disable_adapter():
                        alone = two_languages.get_text_features(**inputs).pooler_output
                else:
                    two_languages.set_adapter(language)
                    alone = two_languages.get_text_features(**inputs).pooler_output
                torch.testing.assert_close(mixed[part], alone, rtol=1e-5, atol=1e-5)


def test_a_tower_that_reads_its_padding_in_a_mixed_batch():
    """English is padded to 12 as ever; the other rows' padding is nobody's."""
    config = CrossLingualAdapterConfig(bottleneck_dim=16, num_heads=2).with_encoder(encoder(ZH))
    model = get_peft_model(FAMILIES["siglip"].build(), config, adapter_name="zh").eval()
    processor = LanguageProcessor(en=siglip_like(), zh=tokenizer("z", **ZH), padding={"en": "max_length"})
    with torch.no_grad():
        mixed = model.get_text_features(**processor(["z0", "e0", "z1 z2"], language=["zh", "en", "zh"])).pooler_output
        with model.disable_adapter():
            english = model.get_text_features(**processor(["e0"])).pooler_output
        chinese = model.get_text_features(**processor(["z0", "z1 z2"], language="zh")).pooler_output
    torch.testing.assert_close(mixed, torch.cat([chinese[:1], english, chinese[1:]]), rtol=1e-5, atol=1e-5)


def test_wrong_languages_are_refused_by_the_model(two_languages):
    processor = LanguageProcessor(**tokenizers(fr=tokenizer("f", **ZH)))
    with pytest.raises(ValueError, match=r"No adapter for \['fr'\].*'zh', 'ja'"):
        two_languages.get_text_features(**processor(["f0", "e0"], language=["fr", "en"]))
    two_languages.set_adapter("ja")
    with pytest.raises(ValueError, match=r"outside the 30 tokens of adapter 'ja'.*LanguageProcessor"):
        two_languages.get_text_features(input_ids=processor(["z31"], language="zh")["input_ids"])


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(["z0"], language="fr"), r"no tokenizer for 'fr', but for \['en', 'zh', 'ja'\]"),
        (lambda p: p(["z0", "f0"], language=["zh", "fr"]), "no tokenizer for 'fr'"),
        (lambda p: p.tokenizer("__base__"), "no tokenizer for '__base__'"),
        (lambda p: p.batch_decode([[1]], "fr"), "no tokenizer for 'fr'"),
        (lambda p: p(["z0", ""], language="zh"), "Text 1 is empty"),
        (lambda p: p(["  \n", "z0"], language="zh"), "Text 0 is empty"),
        (lambda p: p(["z0", None], language="zh"), "Text 1 is empty or no string: None"),
        (lambda p: p(["z0", 7], language="zh"), "Text 1 is empty or no string: 7"),
        (lambda p: p(["z0", "e0", ""], language=["zh", "en", "en"]), "is empty or no string: ''"),
        (lambda p: p(["z0", "e0"], language=["zh"]), "1 languages for 2 texts"),
        (lambda p: p("z0", language=["zh", "en"]), "2 languages for 1 texts"),
        (lambda p: p("z0", images=Image.new("RGB", (4, 4))), "no image_processor"),
        (lambda p: LanguageProcessor(), "needs tokenizers"),
        (lambda p: LanguageProcessor(padding=True), "needs tokenizers"),
    ],
)
def test_errors(processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(processor)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "zh\n", "z h", "中文", "/etc", "a\\b", "C:"])
def test_a_language_is_called_by_a_name(name, tmp_path, processor):
    with pytest.raises(ValueError, match="is no name of a language"):
        LanguageProcessor(**{"en": tokenizer("e", **EN), name: tokenizer("z", **ZH)})
    processor.save_pretrained(tmp_path)
    file = tmp_path / LanguageProcessor.FILE
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "languages": ["en", name]}))
    with pytest.raises(ValueError, match="is no name of a language"):
        LanguageProcessor.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------- storage


def test_round_trip(tmp_path):
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    left = tokenizer("z", **ZH, padding_side="left")
    processor = LanguageProcessor(
        **{"zh-Hant_1": left, **tokenizers(en=siglip_like())},  # the first is the tower's, whatever its name
        image_processor=images,
        padding={"en": "max_length"},
        max_length={"ja": 4},
    )
    processor.save_pretrained(tmp_path / "new" / "folder")
    again = LanguageProcessor.from_pretrained(tmp_path / "new" / "folder")
    assert again.languages == processor.languages == ["zh-Hant_1", "en", "zh", "ja"]
    assert (again.padding, again.max_length) == (processor.padding, processor.max_length)
    for name in processor.languages:
        texts = [f"{letter}1 " * n for n in (1, 30) for letter in "ezj"]
        for a, b in zip(processor(texts, language=name).items(), again(texts, language=name).items(), strict=True):
            assert a[0] == b[0]
            assert a[1] == b[1] if a[0] == "adapter_names" else torch.equal(a[1], b[1])
    image = Image.new("RGB", (20, 30), (200, 100, 0))
    assert torch.equal(processor(images=image)["pixel_values"], again(images=image)["pixel_values"])
    again.save_pretrained(tmp_path / "twice")
    for file in ("new/folder", "twice"):
        assert json.loads((tmp_path / file / LanguageProcessor.FILE).read_text())["images"] is True


def test_round_trip_without_images_and_over_old_files(tmp_path):
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LanguageProcessor(**tokenizers(), image_processor=images).save_pretrained(tmp_path)
    LanguageProcessor(zh=tokenizer("z", **ZH), padding="max_length", max_length=7).save_pretrained(tmp_path)
    again = LanguageProcessor.from_pretrained(str(tmp_path))
    assert again.image_processor is None
    assert again.languages == ["zh"]
    assert again("z0")["input_ids"].shape == (1, 7)


def test_an_adapter_of_the_languages_name_lies_beside_it(tmp_path, two_languages, processor):
    """Both are saved to one folder by Trainer; the adapter's is named zh."""
    two_languages.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "zh" / "adapter_model.safetensors").exists()
    found = LanguageProcessor.from_pretrained(tmp_path)
    assert found("z0", language="zh")["input_ids"].tolist() == [[7, 8, 3]]


def test_a_folder_without_one_is_named(tmp_path):
    with pytest.raises(OSError, match=LanguageProcessor.FILE):
        LanguageProcessor.from_pretrained(tmp_path)


def test_it_goes_to_workers(processor):
    again = pickle.loads(pickle.dumps(processor))
    assert again.languages == processor.languages
    assert torch.equal(again("z0", language="zh")["input_ids"], processor("z0", language="zh")["input_ids"])
