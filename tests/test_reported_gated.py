"""What people do with GatedXAttn in their first hour: the printed recipe, a second pair of eyes, a wrong marker, chats."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docs_models
import pytest
import torch
import transformers as hf
from families import VOCAB, text_tower, tiny, vision_tower
from methods import adapter, distance, stir, trace
from peft import PeftModel, get_peft_model
from PIL import Image

from peft_multimodal import GatedXAttnConfig, InterleavedProcessor, MediaCache, load, save

MARKER, WIDTH = VOCAB, 32
SIZES = {"num_latents": 3, "resampler_depth": 1, "resampler_heads": 2, "head_dim": 8, "max_frames": 2}
build = tiny(hf.LlamaForCausalLM, hf.LlamaConfig(**text_tower(WIDTH, num_key_value_heads=2)))


@pytest.fixture(scope="module")
def eyes(tmp_path_factory) -> str:
    """The folder of a tiny vision encoder."""
    folder = tmp_path_factory.mktemp("eyes")
    tiny(hf.CLIPVisionModel, hf.CLIPVisionConfig(**vision_tower(20)))().save_pretrained(folder)
    return str(folder)


def config(eyes: str, **changes: Any) -> GatedXAttnConfig:
    return GatedXAttnConfig(**{"media_token_id": MARKER, "vision_encoder": eyes, **SIZES, **changes})


def inputs() -> dict[str, torch.Tensor]:
    pixels = torch.randn(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([[1, MARKER, 5, 6], [MARKER, 7, 8, 9]]), "pixel_values": pixels}


@torch.no_grad()
def logits(model: Any, **changes: Any) -> torch.Tensor:
    return model.eval()(**{**inputs(), **changes}).logits


# ------------------------------------------------------------------------------------------- a second adapter with eyes


@pytest.fixture
def two(eyes: str, tmp_path: Path) -> tuple[Path, list[torch.Tensor]]:
    """Two adapters in folders, and what each gives."""
    outputs = []
    for seed, name in enumerate(("one", "two")):
        model = stir(get_peft_model(build(), config(eyes)), seed=seed)
        save(model, tmp_path / name)
        outputs.append(logits(model))
    return tmp_path, outputs


def by_load_adapter(model: Any, folder: Path, eyes: str) -> Any:
    model.load_adapter(folder, "two")
    return model


def by_load(model: Any, folder: Path, eyes: str) -> Any:
    return load(model, folder, adapter_name="two")


def by_a_second_wrap(model: Any, folder: Path, eyes: str) -> Any:
    return load(model.get_base_model(), folder, adapter_name="two")


def by_add_adapter(model: Any, folder: Path, eyes: str) -> Any:
    model.add_adapter("two", config(eyes))
    model.load_adapter(folder, "two")
    return model


def after_delete(model: Any, folder: Path, eyes: str) -> Any:
    model.add_adapter("other", config(eyes))
    model.delete_adapter("other")
    return by_add_adapter(model, folder, eyes)


WAYS = [by_load_adapter, by_load, by_a_second_wrap, by_add_adapter, after_delete]


@pytest.mark.parametrize("add", WAYS)
def test_a_second_adapter_brings_its_vision_encoder(add: Callable, two, eyes: str):
    folder, outputs = two
    model = load(build(), folder / "one")
    both = add(model, folder / "two", eyes)
    for name, expected in zip(("two", "default"), outputs[::-1], strict=True):
        both.set_adapter(name)
        assert distance(logits(both), expected) <= 1e-6
    assert distance(*outputs) > 1e-3
    reader = both.get_base_model().gated_xattn_reader
    assert len(reader.encoders) == 1, "the encoder is shared"


def test_a_model_that_reads_pixels_itself_still_gets_no_encoder(eyes: str):
    from families import FAMILIES

    for model in (
        FAMILIES["llava"].build(),
        get_peft_model(FAMILIES["llava"].build(), config("", vision_encoder=None, vision_hidden_size=20)),
    ):
        with pytest.raises(ValueError, match="reads pixel_values itself"):
            model.add_adapter("two", config(eyes)) if isinstance(model, PeftModel) else get_peft_model(
                model, config(eyes)
            )


# ----------------------------------------------------------------------------------------------------- a wrong marker


def test_a_marker_that_is_not_the_tokenizers_is_named(eyes: str):
    """Its id lies beyond the embedding, and the adapter's marker is another one."""
    model = get_peft_model(build(), config(eyes, media_token_id=7))
    for call in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
        with pytest.raises(
            ValueError, match=rf"input_ids hold {MARKER}, .* has {VOCAB} rows .*set media_token_id={MARKER}"
        ):
            call(**inputs())


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
def test_a_marker_that_the_tokenizer_does_not_have_is_refused(eyes: str, name: str):
    """`convert_tokens_to_ids("<image>")` gives the unknown token, which language models share with end and padding."""
    base = build()
    before = trace(base)
    with pytest.raises(ValueError, match=rf"is the {name} of LlamaForCausalLM.*InterleavedProcessor"):
        get_peft_model(base, config(eyes, media_token_id=getattr(base.config, name)))
    assert trace(base) == before
    with pytest.raises(ValueError, match=r"media_token_id must be .*InterleavedProcessor.media_token_id, got None"):
        config(eyes, media_token_id=None)


def test_images_without_a_marker_are_an_error(eyes: str):
    model, given = get_peft_model(build(), config(eyes)), inputs()
    text = given["input_ids"].clamp_max(VOCAB - 1)
    features = torch.randn(2, 1, 1, 5, 20)
    for name, images in (("pixel_values", given["pixel_values"]), ("vision_features", features)):
        for call in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
            with pytest.raises(ValueError, match=rf"{name} hold images, but no row .* marker, media_token_id={MARKER}"):
                call(input_ids=text, **{name: images})
    assert model(input_ids=text).logits.shape[:2] == text.shape
    mixed = torch.cat([given["input_ids"][:1], text[1:]])  # one row has no image: its place is padding
    assert model(input_ids=mixed, pixel_values=given["pixel_values"]).logits.isfinite().all()


def test_embeddings_may_stand_in_for_ids(eyes: str):
    """`generate` passes no ids then, or none that count."""
    model = get_peft_model(build(), config(eyes)).eval()
    embeds = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    plain = model.generate(inputs_embeds=embeds, max_new_tokens=3, do_sample=False)
    empty = torch.zeros(1, 0, dtype=torch.long)
    assert torch.equal(model.generate(empty, inputs_embeds=embeds, max_new_tokens=3, do_sample=False), plain)


def test_past_key_values_warn_of_nothing(eyes: str):
    """transformers 5.24 calls it `cache`; what this package's pages print works silently with both."""
    model, given, media = get_peft_model(build(), config(eyes)).eval(), inputs(), MediaCache()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        past = hf.DynamicCache(config=model.config)
        model(**given, media=media, past_key_values=past, use_cache=True)
        assert past.get_seq_length() == 4
        more = torch.tensor([[5], [6]])
        cached = model(input_ids=more, attention_mask=torch.ones(2, 5), media=media, past_key_values=past).logits
    whole = logits(model, input_ids=torch.cat([given["input_ids"], more], dim=1))
    assert distance(cached[:, -1], whole[:, -1]) <= 1e-5


# -------------------------------------------------------------------------------------------- the size, and the start


def test_the_defaults_start_as_the_language_model(eyes: str):
    model = get_peft_model(build(), GatedXAttnConfig(vision_encoder=eyes, media_token_id=MARKER - 1))
    text = torch.tensor([[MARKER - 1, 5, 6]] * 2)
    assert torch.equal(logits(model, input_ids=text), build()(input_ids=text).logits)
    model.train()(**inputs() | {"input_ids": text}, labels=text).loss.backward()
    lasts = {
        n: p
        for n, p in adapter(model).items()
        if ".gated_xattn_block." in n and n.endswith(("out.weight", "ffw.2.weight"))
    }
    assert len(lasts) == 4
    assert all(p.grad.abs().max() > 0 for p in lasts.values()), "all of them learn from the first step"


def smol(**changes: Any) -> hf.LlamaForCausalLM:
    """SmolLM2-135M's shape, without its weights."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    with torch.device("meta"):
        return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=49152, num_key_value_heads=3, **{**sizes, **changes}))


def test_a_large_adapter_is_announced_with_its_numbers():
    own = {"media_token_id": 49152, "vision_hidden_size": 384}
    paper = {"resampler": "perceiver", "every_n_layers": 1, "ff_mult": 4, "resampler_depth": 6}
    with pytest.warns(
        UserWarning, match=r"will train 1[12]\d,\d{3},\d{3} parameters \(4\d\d MB .*% of .*30 blocks with ff_mult=4"
    ):
        get_peft_model(smol(), GatedXAttnConfig(**own, **paper))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(smol(), GatedXAttnConfig(**own))
    assert sum(p.numel() for p in adapter(model).values()) < 0.1 * sum(p.numel() for p in smol().parameters())
    assert model.peft_config["default"].every_n_layers == 6


@pytest.mark.parametrize(("layers", "blocks"), [(1, 1), (2, 2), (5, 5), (9, 9), (12, 6), (24, 6), (32, 5)])
def test_blocks_are_spread_over_any_depth(layers: int, blocks: int, eyes: str, tmp_path: Path):
    base = tiny(hf.LlamaForCausalLM, hf.LlamaConfig(**text_tower(WIDTH, num_hidden_layers=layers)))
    model = get_peft_model(base(), config(eyes))
    assert sum(n.endswith("attention_gate_norm") for n in adapter(model)) == blocks
    if layers == 12:
        save(stir(model), tmp_path)
        assert distance(logits(load(base(), tmp_path)), logits(model)) <= 1e-6


def test_gate_none_needs_no_other_field(eyes: str):
    model = get_peft_model(build(), config(eyes, gate="none"))
    assert all(p.abs().max() > 0 for n, p in adapter(model).items() if n.endswith("out.weight"))
    with pytest.raises(ValueError, match=r"gate_init must be left out where gate='none', got 0.5"):
        config(eyes, gate="none", gate_init=0.5)


# ------------------------------------------------------------------------------------------- labels of the answer alone

CHAT = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
RED = Image.new("RGB", (16, 16), "red")
QUESTION = "<image>what colour is it?"


def processor(kind: type = hf.GPT2Tokenizer, chat: str | None = CHAT, **changes: Any) -> InterleavedProcessor:
    tokenizer = docs_models.tokenizer(kind)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"], "eos_token": "<|end|>"})
    tokenizer.chat_template = chat
    return InterleavedProcessor(tokenizer, hf.ViTImageProcessor(size={"height": 16, "width": 16}), **changes)


def learnt(made: InterleavedProcessor, rows: list[dict[str, Any]]) -> list[str]:
    """What the labels of each row say."""
    batch = made.collate(rows)
    labels, ids = batch["labels"], batch["input_ids"]
    assert bool(((labels == -100) | (labels == ids)).all())
    assert not bool((labels == made.media_token_id).any())
    return [made.tokenizer.decode(row[row != -100]) for row in labels]


@pytest.mark.parametrize("kind", [hf.GPT2Tokenizer, hf.XLMRobertaTokenizer], ids=["BPE", "Unigram"])
def test_of_a_row_with_an_answer_the_answer_alone_is_learnt(kind: type):
    made = processor(kind, chat=None)
    end = made.tokenizer.eos_token
    rows = [
        {"text": QUESTION, "answer": " red", "images": [RED]},
        {"text": f"{QUESTION} red{end}{QUESTION}", "answer": f" a photo of a red apple{end}", "images": [RED, RED]},
    ]
    said = [text.removesuffix(end).removesuffix(end).strip() for text in learnt(made, rows)]
    assert said == ["red", "a photo of a red apple"]
    assert all(end in text for text in learnt(made, rows))
    asked = made([QUESTION], images=[[RED]])["input_ids"][0]
    batch = made.collate(rows[:1])
    prompt = batch["input_ids"][0][batch["labels"][0] == -100]
    assert prompt.tolist() == asked.tolist()[: len(prompt)], "the prompt that is asked later"
    whole = made.collate([{"text": f"{QUESTION} red{end}", "images": [RED]}])
    assert (whole["labels"] != -100).sum() > (batch["labels"] != -100).sum(), "without an answer the text is learnt"


def test_of_a_conversation_the_assistants_words_are_learnt():
    made = processor()
    ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]}
    red, green = ({"role": "assistant", "content": c} for c in ("red", "green"))
    rows = [
        {"text": [ask, red], "images": [RED]},
        {"text": [ask, red, {"role": "user", "content": QUESTION}, green], "images": [RED, RED]},
        {"text": [{"role": "system", "content": "this is"}, ask], "answer": "a red car", "images": [RED]},
    ]
    assert learnt(made, rows) == ["red<|end|>\n", "red<|end|>\ngreen<|end|>\n", "a red car<|end|>\n"]
    asked = made([ask], images=[[RED]])
    assert made.decode(asked["input_ids"][0]).endswith("<|start|>assistant\n")
    batch = made.collate(rows[:1])
    assert batch["input_ids"][0][batch["labels"][0] == -100].tolist() == asked["input_ids"][0].tolist()
    assert asked["input_ids"].tolist() == made([[ask]], images=[[RED]])["input_ids"].tolist()


def test_an_answer_that_is_cut_off_is_an_error():
    made = processor(chat=None)
    row = {"text": QUESTION, "answer": " red", "images": [RED]}
    full = len(made.collate([row])["input_ids"][0])

    short = InterleavedProcessor(made.tokenizer, made.image_processor, max_length=full - 1)
    assert (short.collate([row])["labels"] != -100).sum() >= 1
    short.max_length = 3
    with pytest.raises(ValueError, match=r"Row 0: nothing is left of its answer in 3 tokens"):
        short.collate([row])
    short.tokenizer.truncation_side, short.max_length = "left", full - 2
    text = short.collate([{**row, "images": [RED]}])
    assert short.decode(text["labels"][0][text["labels"][0] != -100]).startswith(" red")


@pytest.mark.parametrize(
    ("row", "chat", "message"),
    [
        ({"text": QUESTION, "answer": ""}, None, "Row 0: column 'answer' is empty"),
        ({"text": QUESTION, "answer": 3}, None, "Row 0: column 'answer' is empty or no string: 3"),
        ({"text": [{"role": "user", "content": QUESTION}]}, CHAT, "no message of the assistant"),
        ({"text": [{"role": "user", "content": QUESTION}]}, None, "has no chat template"),
        (
            {"text": [{"role": r, "content": c} for r, c in (("user", QUESTION), ("assistant", "red"))]},
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "writes the beginning of this conversation otherwise",
        ),
    ],
)
def test_what_collate_can_not_learn_from_is_refused(row: dict, chat: str | None, message: str):
    with pytest.raises(ValueError, match=message):
        processor(chat=chat).collate([{**row, "images": [RED]}])


def test_texts_and_conversations_do_not_mix():
    made, chat = processor(), [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "red"}]
    with pytest.raises(ValueError, match="texts and conversations in one batch"):
        made.collate([{"text": chat, "images": [RED]}, {"text": QUESTION, "images": [RED]}])
    with pytest.raises(ValueError, match="Texts and conversations were given in one batch"):
        made([QUESTION, chat], images=[[RED], [RED]])


def test_a_column_of_answers_may_be_left_alone():
    """Where the text ends with the answer, and the column is there to compare with."""
    made = processor(answer_column=None)
    rows = [{"text": "what? red", "answer": "red", "images": []}]
    assert learnt(made, rows) == learnt(processor(), [{"text": "what? red", "images": []}])


def test_the_answers_column_travels_with_the_processor(tmp_path: Path):
    processor(answer_column="reply").save_pretrained(tmp_path)
    again = InterleavedProcessor.from_pretrained(tmp_path)
    assert learnt(again, [{"text": QUESTION, "reply": " red", "images": [RED]}]) == [" red<|end|>"]


def test_the_benchmark_trains_what_the_page_prints():
    """The config is the default one, and what Trainer is told stands in both."""
    from benchmarks import experiment

    item = experiment.load("seeing", "gated_xattn/readme")
    assert item.peft == {"peft_type": "GATED_XATTN"}
    text = (Path(__file__).parents[1] / "docs" / "gated-xattn.md").read_text("utf-8")
    assert re.search(r"GatedXAttnConfig\(vision_encoder=\S+, media_token_id=processor.media_token_id\)\n", text)
    rates = re.findall(r"GatedXAttnConfig\(.*?learning_rate=([\d.e-]+)", text, re.DOTALL)[:1]
    assert [float(rate) for rate in rates] == [item.training["learning_rate"]]


def test_without_gguf_the_benchmarks_language_model_says_what_to_install(monkeypatch, tmp_path: Path):
    from benchmarks.assets import AssetError, smollm2

    monkeypatch.setenv("PEFT_MULTIMODAL_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"is read with the package gguf: pip install"):
        smollm2()
    assert not list(tmp_path.glob("smollm2*/*")), "nothing half-made is left"
