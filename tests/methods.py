"""What the contract's tests do with each method alike; the methods' own test files declare their cases (`case.py`).

python tests/methods.py FOLDER     # the fresh process: reloads what `save_all` saved, prints {method/family: difference}
"""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from case import declared
from families import BOS, EOS, FAMILIES, PAD, SEP, VOCAB, Family, text_tower, tiny
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from peft_multimodal.methods.structured_prompt.classifier import PromptedClassifier

# Families with a text tower of its own, that can be exchanged as a whole.
TEXT_TOWER = ("clip", "siglip", "chinese_clip", "altclip", "vision_text_dual_encoder", "flava")
ENCODER_WIDTH = 28


@functools.cache
def language(width: int = ENCODER_WIDTH, words: str = "w", layers: int = 2) -> str:
    """A folder with the tiny encoder of another language and its tokenizer: the words w4, w5, ... are its tokens."""
    folder = tempfile.mkdtemp(prefix="language-encoder-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_encoder(folder, width, words, layers)
    return folder


def save_encoder(folder: str | Path, width: int = ENCODER_WIDTH, words: str = "w", layers: int = 2) -> None:
    config = hf.BertConfig(**text_tower(width, num_hidden_layers=layers), hidden_dropout_prob=0.0)
    tiny(hf.BertModel, config)().save_pretrained(folder)
    tokens = {PAD: "[PAD]", BOS: "[CLS]", EOS: "[UNK]", SEP: "[SEP]"}
    vocabulary = {tokens.get(i, f"{words}{i}"): i for i in range(VOCAB)}
    hf.BertTokenizer(vocab=vocabulary).save_pretrained(folder)


CLASSES = ["w4 w5", "w6", "w7 w8 w9", "w4"]


@functools.cache
def word_tokenizer(bos: int | None = BOS, eos: int | None = VOCAB - 1, size: int = VOCAB) -> hf.PreTrainedTokenizerFast:
    """Knows "a" and the words w0, w1, ... by their ids; puts [BOS] and [EOS] around a text.

    CLIP models of old configs (eos_token_id 2) pool at the largest id, which therefore is [EOS]'s.
    """
    special = {"[PAD]": PAD, "[BOS]": bos, "[EOS]": eos}
    frame = [(token, i) for token, i in special.items() if i is not None and token != "[PAD]"]
    vocabulary = {f"w{i}": i for i in range(size) if i not in special.values()}
    vocabulary = {"a": vocabulary.pop("w3"), **vocabulary, **dict(frame), "[PAD]": PAD}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = ["[BOS]"] * (bos is not None) + ["$A"] + ["[EOS]"] * (eos is not None)
    made.post_processor = processors.TemplateProcessing(single=" ".join(around), special_tokens=frame)
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")


_TABLES: dict[str, Callable[[], Any]] = {
    "METHODS": lambda: {name: case.config for name, case in declared().items()},
    "CASES": lambda: [(family, name) for name, case in declared().items() for family in case.families()],
}


@functools.cache
def __getattr__(name: str) -> Any:
    """METHODS, {case: function (family, **changes) -> config}, and CASES, every (family, case): made when first asked for,
    since the test files that declare them import this one."""
    if name in _TABLES:
        return _TABLES[name]()
    raise AttributeError(name)


def home(method: str) -> Family:
    """The family on which a method is looked at where one is enough."""
    applies = declared()[method].families()
    return FAMILIES[next(name for name in ("blip_retrieval", "clip", "llava", "llama") if name in applies)]


def promising(**what: Any) -> set[str]:
    """Names of the cases that promise this: promising(acts_on="tower")."""
    return {n for n, case in declared().items() if all(getattr(case.promises, k) == v for k, v in what.items())}


# What no optimizer may decay.
NO_DECAY = re.compile(r"norm|bias|gate|scale|shift|gamma|lambda|_P[._]")


# ------------------------------------------------------------------------------------------------------------- steps


def wrap(family: Family, method: str, stirred: bool = True, base: nn.Module | None = None, **changes: Any) -> PeftModel:
    """A fresh model with an adapter: as it is at its start, or `stirred`, far from it."""
    name = changes.pop("adapter_name", "default")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base or family.build(), declared()[method].config(family, **changes), adapter_name=name)
    fill(family, model)
    return stir(model, name) if stirred else model


def fill(family: Family, model: PeftModel) -> None:
    """Put something into the active adapter's context bank, without which its gate has no gradient."""
    ready(model)
    if any(getattr(config, "use_ice", False) for config in model.peft_config.values()):
        model.base_model.collect_context([family.text_inputs(model)])


def adapter(model: PeftModel, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of an adapter."""
    prefix = model.base_model.prefix
    found = {n: p for n, p in model.named_parameters() if f".{prefix}" in n and adapter_of(n, prefix) == name}
    assert found
    return found


def adapter_of(tensor: str, prefix: str) -> str:
    """The adapter that a tensor belongs to: its name follows its container's, `<prefix>P_norm.default`."""
    return tensor.rpartition(f".{prefix}")[2].split(".")[1]


@torch.no_grad()
def stir(model: PeftModel, name: str = "default", seed: int = 0) -> PeftModel:
    """Move every parameter of an adapter by noise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter(model, name).values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.1 * noise.to(parameter))
    return model


def ready(model: nn.Module, tokenizer: Any = None) -> nn.Module:
    """With a tokenizer, for the method that reads captions with it: none is saved."""
    for part in (m for m in model.modules() if isinstance(m, PromptedClassifier)):
        if part.tokenizer is None:
            part.set_tokenizer(tokenizer or word_tokenizer())
    return model


@torch.no_grad()
def run(family: Family, model: nn.Module, **changes: Any) -> Tensor:
    """The model's output on the family's batch."""
    ready(model)
    return family.output(model(**{**inputs(family, model), **changes}))


def inputs(family: Family, model: nn.Module) -> dict[str, Any]:
    """The batch in the dtype of the model."""
    dtype = next(p.dtype for p in model.parameters())
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.inputs(model).items()}


def gradients(family: Family, model: PeftModel, name: str = "default") -> dict[str, Tensor | None]:
    model.zero_grad()
    family.loss(model).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in adapter(model, name).items()}


def silent(family: Family, parameter: str) -> bool:
    """Whether the output never depends on the module of a parameter."""
    return parameter.removeprefix("base_model.model.").startswith(family.silent or " ")


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything that a method could leave behind in a model."""
    return {
        path: (
            type(module),
            set(vars(module)) - {"peft_config"},  # PEFT leaves it after any method
            {k: len(v) for k, v in vars(module).items() if "hooks" in k and hasattr(v, "__len__")},
            *(list(vars(module)[k]) for k in ("_modules", "_parameters", "_buffers")),
        )
        for path, module in model.named_modules()
    }


# --------------------------------------------------------------------------------------------------- a fresh process


def save_all(folder: Path) -> None:
    """An adapter of each method and family, and its outputs."""
    for method, case in declared().items():
        for name in case.families():
            family, path = FAMILIES[name], folder / method / name
            model = wrap(family, method)
            model.save_pretrained(path)
            torch.save({"base": run(family, family.build()), "adapted": run(family, model)}, path / "outputs.pt")


def reload_all(folder: Path) -> dict[str, list[float]]:
    """{method/family: [distance to the output that was saved, to the base model's]}."""
    result = {}
    for path in sorted(folder.glob("*/*")):
        family, saved = FAMILIES[path.name], torch.load(path / "outputs.pt")
        output = run(family, PeftModel.from_pretrained(family.build(), path))
        result[f"{path.parent.name}/{path.name}"] = [
            distance(output, saved["adapted"]),
            distance(output, saved["base"]),
        ]
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(reload_all(Path(sys.argv[1]))))
