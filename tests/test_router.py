"""The modality of every token, in every family: beside what the tokens themselves show."""

from __future__ import annotations

import threading
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, IMAGE, ROWS, WORDS, Family, pairs, text_tower, tiny, vision_tower
from torch import Tensor, nn

from peft_multimodal.core.anatomy import describe, stack_of
from peft_multimodal.nn.router import ModalityRouter
from peft_multimodal.nn.single_streams import AUDIO, NONE, TEXT, VIDEO, Stream, order_of
from peft_multimodal.nn.single_streams import IMAGE as SEEN


def visual_bert() -> Family:
    config = hf.VisualBertConfig(**text_tower(32), visual_embedding_dim=20)

    def batch() -> dict[str, Any]:
        inputs = pairs()()
        inputs["visual_embeds"] = torch.randn(ROWS, 5, 20, generator=torch.Generator().manual_seed(1))
        del inputs["pixel_values"]
        # Its class wants one mask for both.
        return {**inputs, "visual_attention_mask": torch.ones(ROWS, 5)}

    return Family(
        name="visual_bert",
        kind="fusion",
        build=tiny(hf.VisualBertModel, config),
        batch=batch,
        output=lambda out: out.last_hidden_state,
        towers={},
    )


FAMILIES_HERE = {**FAMILIES, "visual_bert": visual_bert()}
MEDIA = ("pixel_values", "visual_embeds")


def layers_of(model: nn.Module) -> dict[str, str]:
    """{stack: its first layer}."""
    found = describe(model)
    layers: dict[str, str] = {}
    for matrix in (m for m in found.matrices if m.letter == "q"):
        stack = stack_of(matrix.module)
        number = matrix.module.removeprefix(stack + ".").partition(".")[0]
        if number.isdigit():
            layers.setdefault(stack, f"{stack}.{number}")
    return layers


@torch.no_grad()
def watch(
    model: nn.Module, inputs: dict[str, Any], router: ModalityRouter | None = None
) -> dict[str, tuple[Tensor, Any]]:
    """{layer: (what it reads, what the router says of that)} in one call."""
    seen: dict[str, tuple[Tensor, Any]] = {}
    handles = []
    for path in layers_of(model).values() if router else ():
        router.modalities(path)
    for path in layers_of(model).values():

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any], path: str = path) -> None:
            states = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            seen[path] = states.clone(), router.modality(path, states) if router else None

        handles.append(model.get_submodule(path).register_forward_pre_hook(look, with_kwargs=True))
    torch.manual_seed(3)  # ViLT shuffles patches
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def moved(before: Tensor, after: Tensor) -> Tensor:
    return (before - after).abs().amax(-1) > 1e-6


@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_what_moves_with_the_images_is_an_image(name: str):
    """The oracle: run it again with other images, and with other words."""
    family = FAMILIES_HERE[name]
    model = family.build()
    inputs = family.inputs(model)
    router = ModalityRouter(model)
    seen = watch(model, inputs, router)

    media = {
        k: torch.randn(v.shape, generator=torch.Generator().manual_seed(5)) for k, v in inputs.items() if k in MEDIA
    }
    ids = inputs["input_ids"]
    words = torch.where(ids >= WORDS[0], (ids - WORDS[0] + 7) % (WORDS[1] - WORDS[0]) + WORDS[0], ids)
    words = torch.where(ids == IMAGE, ids, words)
    by_image, by_text = watch(model, {**inputs, **media}), watch(model, {**inputs, "input_ids": words})
    assert seen
    for path, (states, kinds) in seen.items():
        one = router.modalities(path)
        kinds = torch.full(states.shape[:2], one[0]) if kinds is None else kinds
        assert kinds.shape == states.shape[:2]
        assert kinds.dtype == torch.long
        assert set(kinds.unique().tolist()) <= set(one)
        image, text = moved(states, by_image[path][0]), moved(states, by_text[path][0])
        assert (kinds[image & ~text] == SEEN).all(), path
        assert (kinds[text & ~image] == TEXT).all(), path
        still = ~text & ~image
        if SEEN in one and TEXT in one:  # in one stream nothing else is an image than those and class tokens
            assert image.any()
            assert text.any()
            assert (kinds[still] != SEEN).all() or name == "vilt"


KINDS = {
    "clip": {"vision_model.encoder.layers": (SEEN,), "text_model.encoder.layers": (TEXT,)},
    "blip_retrieval": {"text_encoder.encoder.layer": (TEXT,)},
    "blip_2": {"qformer.encoder.layer": (NONE,), "language_model.model.decoder.layers": (TEXT, SEEN)},
    "flava": {"multimodal_model.encoder.layer": (NONE, TEXT, SEEN), "image_model.encoder.layer": (SEEN,)},
    "vilt": {"vilt.encoder.layer": (TEXT, SEEN)},
    "visual_bert": {"encoder.layer": (TEXT, SEEN)},
    "bridgetower": {"bridgetower.cross_modal_text_layers": (TEXT,), "bridgetower.cross_modal_image_layers": (SEEN,)},
    "qwen2_5_vl": {"model.language_model.layers": (TEXT, SEEN, VIDEO), "model.visual.blocks": (SEEN,)},
    "mllama": {"model.language_model.layers": (TEXT,)},
    "florence2": {"model.language_model.encoder.layers": (TEXT, SEEN), "model.language_model.decoder.layers": (TEXT,)},
    "llama": {"model.layers": (TEXT,)},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_modalities_of_a_stack(name: str):
    router = ModalityRouter(FAMILIES_HERE[name].build())
    assert {stack: router.modalities(f"{stack}.0") for stack in KINDS[name]} == KINDS[name]


LLAVA = FAMILIES["llava"]


def mixed(model: nn.Module, router: ModalityRouter) -> str:
    """The first layer of the one stack that reads several modalities."""
    (path,) = [path for path in layers_of(model).values() if len(router.modalities(path)) > 1]
    return path


class Told:
    """What a router tells in the first decoder layer of a model, call by call."""

    def __init__(self, model: nn.Module) -> None:
        self.router = ModalityRouter(model)
        self.path = mixed(model, self.router)
        self.kinds: list[Tensor] = []
        self.hook = model.get_submodule(self.path).register_forward_pre_hook(self.ask, with_kwargs=True)

    def ask(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kinds = self.router.modality(self.path, args[0] if args else kwargs["hidden_states"])
        assert kinds is not None
        self.kinds.append(kinds)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "paligemma"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_what_is_written_is_text(name: str, use_cache: bool):
    """Also where the model writes its own placeholder."""
    family = FAMILIES[name]
    model = family.build()
    told, inputs = Told(model), family.generate_inputs(model)
    score = 1e4 if use_cache else -1e4  # without a cache, transformers looks for the image of a written placeholder
    model.get_output_embeddings().register_forward_hook(
        lambda m, args, out: out.index_fill(-1, torch.tensor(IMAGE), score)
    )
    options = {"num_beams": 2} if name == "llava" and use_cache else {}
    written = model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=use_cache, **options)
    length, beams = inputs["input_ids"].shape[1], options.get("num_beams", 1)
    assert len(told.kinds) == 3
    expected = (inputs["input_ids"] == IMAGE).long().repeat_interleave(beams, 0)
    if len(told.kinds[0]) != len(expected):  # transformers reads the prompt before it is spread over the beams
        expected = expected[::beams]
    assert torch.equal(told.kinds[0], expected)
    assert not use_cache or (written[:, length:] == IMAGE).all()
    for kinds in told.kinds[1:]:
        assert not kinds[:, 0 if use_cache else length :].any()


@torch.no_grad()
def test_the_next_turn_brings_an_image_too():
    model = LLAVA.build()
    told, inputs = Told(model), LLAVA.inputs(model)
    inputs.pop("attention_mask")
    past = model(**inputs, use_cache=True).past_key_values
    model(**inputs, past_key_values=past)
    assert torch.equal(told.kinds[1], (inputs["input_ids"] == IMAGE).long())


@torch.no_grad()
def test_types_that_the_processor_tells_come_first():
    model = LLAVA.build()
    told, inputs = Told(model), LLAVA.inputs(model)
    types = torch.randint(0, 4, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0)).int()
    model(**inputs, mm_token_type_ids=types)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    model(inputs_embeds=embeds, mm_token_type_ids=types)
    assert torch.equal(told.kinds[0], types.long())
    assert torch.equal(told.kinds[1], types.long())
    assert AUDIO in told.kinds[0]
    with pytest.raises(ValueError, match=r"inputs_embeds alone.*mm_token_type_ids"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="shape"):
        model(**inputs, mm_token_type_ids=types[:, 1:])
    model(**inputs)  # a call that failed leaves nothing behind
    assert not told.router.scope.is_open
    assert told.router.scope.seen is None


@torch.no_grad()
def test_paligemmas_token_types_are_no_modality():
    family = FAMILIES["paligemma"]
    model = family.build().train()
    told = Told(model)
    inputs = family.train_inputs(model)
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    model(**inputs)
    assert torch.equal(told.kinds[0], (inputs["input_ids"] == IMAGE).long())


@torch.no_grad()
def test_a_single_stream_measures_each_call():
    """Texts and images of other sizes than the measured ones, positional and by embeddings; more patches than are read."""
    family = FAMILIES["vilt"]
    model = family.build()
    model.config.max_image_length = 3
    told, inputs = Told(model), family.inputs(model)
    ids = inputs["input_ids"]
    model(ids[:, :2], pixel_values=inputs["pixel_values"][..., :8])
    model(inputs_embeds=model.get_input_embeddings()(ids), pixel_values=inputs["pixel_values"])
    assert told.kinds[0].tolist() == [[TEXT] * 2 + [SEEN] * 3] * 3  # the image's class token and 2 patches
    assert told.kinds[1].tolist() == [[TEXT] * ids.shape[1] + [SEEN] * 4] * 3


def test_flava_without_a_class_token_of_its_own():
    model = FAMILIES["flava"].build()
    model.multimodal_model.use_cls_token = False
    router = ModalityRouter(model)
    assert router.modalities("multimodal_model.encoder.layer.1") == (TEXT, SEEN)
    assert router.streams["multimodal_model.encoder.layer"].order == ((SEEN, None), (TEXT, "input_ids"))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llava", "vilt", "flava"])
def test_what_checkpointing_recomputes_sees_its_call(name: str, reentrant: bool):
    """In the backward pass, the call's scope is closed: gradients of what depends on the modality stay the same."""
    family = FAMILIES[name]

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = family.build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        router = ModalityRouter(model)
        path = mixed(model, router)
        linear = next(m for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear))

        def double_images(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            kinds = router.modality(path, args[0])
            return torch.where((kinds == SEEN)[..., None], 2 * output, output)

        linear.register_forward_hook(double_images)
        torch.manual_seed(0)
        family.loss(model).backward()
        assert not router.scope.is_open
        router.remove()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, got = gradients(False), gradients(True)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_two_threads_dont_meet():
    model = LLAVA.build()
    told, inputs = Told(model), LLAVA.inputs(model)
    both = threading.Barrier(2, timeout=20)
    model.model.language_model.register_forward_pre_hook(lambda *_: (both.wait(), None)[1])
    threads = [
        threading.Thread(target=lambda rows=rows: model(**{k: v[:rows] for k, v in inputs.items()})) for rows in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(k) for k in told.kinds} == {1, 2}
    for kinds in told.kinds:
        assert torch.equal(kinds, (inputs["input_ids"][: len(kinds)] == IMAGE).long())


@pytest.mark.parametrize("name", ["llava", "flava"])
@torch.no_grad()
def test_compiles_whole(name: str):
    family = FAMILIES[name]
    model = family.build()
    told, inputs = Told(model), family.inputs(model)
    expected = (model(**inputs), told.kinds.pop())
    told.hook.remove()
    layer = model.get_submodule(told.path)
    layer.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] + told.router.modality(told.path, args[0])[..., None], *args[1:]), kwargs),
        with_kwargs=True,
    )
    eager = family.output(model(**inputs))
    compiled = family.output(torch.compile(model, backend="eager", fullgraph=True)(**inputs))
    torch.testing.assert_close(compiled, eager)
    assert not torch.allclose(eager, family.output(expected[0]))


@torch.no_grad()
def test_a_copy_answers_by_itself_and_nothing_is_left():
    model = LLAVA.build().train()
    flags = {p: m.training for p, m in model.named_modules()}
    before, state = {p: len(m._forward_pre_hooks) for p, m in model.named_modules()}, torch.get_rng_state()
    router = ModalityRouter(model)
    model.router = router
    copied = deepcopy(model)
    assert copied.router is not router
    layer = "model.language_model.layers.0"
    kinds: list[Tensor] = []
    copied.get_submodule(layer).register_forward_pre_hook(
        lambda m, args: kinds.append(copied.router.modality(layer, args[0]))
    )
    copied(**LLAVA.inputs(copied))
    assert kinds[0].any()
    router.remove()
    assert {p: len(m._forward_pre_hooks) for p, m in model.named_modules()} == before
    assert {p: m.training for p, m in model.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="Call the model itself"):
        router.modality(layer, torch.zeros(1, 2, 32))


def test_measuring_leaves_the_model_alone():
    model = FAMILIES["vilt"].build().train()
    model.vilt.encoder.eval()
    flags = {p: m.training for p, m in model.named_modules()}
    state = torch.get_rng_state()
    router = ModalityRouter(model)
    router.modalities("vilt.encoder.layer.1")
    assert {p: m.training for p, m in model.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), state)
    router.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_model_without_weights():
    """Placeholders need no run; a single stream says that it waits for its weights."""
    configs = LLAVA.build().config, FAMILIES["vilt"].build().config
    with torch.device("meta"):
        llava, vilt = hf.LlavaForConditionalGeneration(configs[0]), hf.ViltModel(configs[1])
    assert ModalityRouter(llava).modalities("model.language_model.layers.1") == (TEXT, SEEN)
    router = ModalityRouter(vilt)
    with pytest.raises(ValueError, match="meta device"):
        router.modalities("encoder.layer.0")
    vilt.to_empty(device="cpu")
    vilt.load_state_dict(FAMILIES["vilt"].build().vilt.state_dict())
    vilt.embeddings.text_embeddings.position_ids.copy_(torch.arange(40)[None])
    vilt.embeddings.text_embeddings.token_type_ids.zero_()
    assert router.modalities("encoder.layer.0") == (TEXT, SEEN)
    with pytest.raises(ValueError, match="no stack of layers"):
        router.modalities("pooler.dense")


def test_orders():
    words = {3: "input_ids"}
    yes, no = [True], [False]
    assert order_of(yes * 3 + no * 3, no * 4 + yes * 2, words) == Stream(
        (TEXT, SEEN), ((TEXT, "input_ids"), (SEEN, None))
    )
    assert order_of(no * 4 + yes * 3, no + yes * 3 + no * 3, words) == Stream(
        (NONE, TEXT, SEEN), ((NONE, 1), (SEEN, None), (TEXT, "input_ids"))
    )
    assert order_of(no * 3, no * 3, words) == Stream((NONE,))
    assert order_of(yes * 3, yes * 3, words) is None, "both in one token"
    assert order_of(yes * 2 + no * 2, no * 2 + yes * 2, words) is None, "a part of the text"
    assert order_of(yes * 3 + no * 2 + yes * 3, no * 3 + yes * 2 + no * 3, words) is None, "two texts"


@torch.no_grad()
def test_two_images_one_after_the_other():
    """NLVR2 runs one stack for each image."""
    config = hf.ViltConfig(**vision_tower(32), **{"vocab_size": 64, "max_position_embeddings": 40, "num_images": 2})
    config.modality_type_vocab_size = 3
    model = tiny(hf.ViltForImagesAndTextClassification, config)()
    told, inputs = Told(model), pairs()()
    model(**{**inputs, "pixel_values": inputs["pixel_values"][:, None].repeat(1, 2, 1, 1, 1)})
    assert [k.shape for k in told.kinds] == [(3, 7 + 5)] * 2
    assert (told.kinds[1][:, :7] == TEXT).all()
    assert (told.kinds[1][:, 7:] == SEEN).all()
