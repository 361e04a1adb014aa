"""Joining PEFT: real members of its enum, PEFT's own registration, and nothing else in PEFT is touched."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from families import FAMILIES
from methods import METHODS, home
from peft import PeftType, mapping
from peft.utils import register_peft_method

import peft_multimodal
from peft_multimodal.core import registry

TESTS = str(Path(__file__).parent)
NAMES = sorted({METHODS[m](home(m)).peft_type.value for m in METHODS})


def python(code: str, *arguments: str) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_members_are_like_any_other(name: str):
    member = PeftType[name]
    assert member is PeftType(name) is getattr(PeftType, name)
    assert member in PeftType
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    assert [m.name for m in PeftType][-len(NAMES) :] == [m.value for m in PeftType][-len(NAMES) :]
    assert isinstance(member, str)
    assert isinstance(member, PeftType)
    assert member == name
    assert hash(member) == hash(PeftType.LORA.__class__(name))
    assert (member.name, member.value, str(member), repr(member)) == (
        *(name, name),
        *(str(PeftType.LORA).replace("LORA", name), repr(PeftType.LORA).replace("LORA", name)),
    )
    assert pickle.loads(pickle.dumps(member)) is copy.copy(member) is copy.deepcopy(member) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": name}
    assert {member: 1}[PeftType(name)] == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_method_is_in_every_mapping(name: str):
    config, model = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name], mapping.PEFT_TYPE_TO_TUNER_MAPPING[name]
    assert config.__module__.startswith("peft_multimodal.")
    assert model.__module__.startswith("peft_multimodal.")
    prefix = f"{name.lower()}_"
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] == model.prefix == prefix
    assert getattr(peft_multimodal, config.__name__) is config
    assert {config.__name__, model.__name__} <= set(peft_multimodal.__all__)
    with pytest.raises(KeyError, match="already PEFT method"):
        register_peft_method(name=name.lower(), config_cls=config, model_cls=model)


def test_importing_again_and_reloading():
    code = """
import importlib, sys
import peft, peft_multimodal
before = list(peft.PeftType)
importlib.reload(sys.modules["peft_multimodal.methods.aurora_mode_approx"])
importlib.reload(peft_multimodal)
for name in [n for n in sys.modules if n.startswith("peft_multimodal")]:
    del sys.modules[name]
import peft_multimodal
assert list(peft.PeftType) == before
config = peft_multimodal.AuroraModeApproxConfig
assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["AURORA_MODE_APPROX"] is config
from families import FAMILIES
model = peft.get_peft_model(FAMILIES["clip"].build(), config(r=2))
model(**FAMILIES["clip"].inputs(model))
print("ok")
"""
    assert python(f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{code}") == "ok"


def test_every_method_is_in_the_one_list():
    assert sorted(name.upper() for name in registry.METHODS) == NAMES
    for name, found in registry.METHODS.items():
        config, model = (
            mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name.upper()],
            mapping.PEFT_TYPE_TO_TUNER_MAPPING[name.upper()],
        )
        assert (found.name, found.config, found.model) == (name, config, model)
        assert (Path(__file__).parents[1] / found.docs).is_file()
        assert found.summary.endswith(".")
        assert registry.method_of(found.smallest()) is registry.method_of(name.upper()) is found
    assert registry.method_of(peft.LoraConfig()) is None


@pytest.mark.parametrize("place", ["core", "encoders", "nn", "training", "files", "doctor.py"])
def test_no_method_is_named_outside_its_own_files(place: str):
    """Neither in code nor in a message, a docstring or a comment; an example of `help()` needs one that exists."""
    names = [name for m in registry.METHODS.values() for name in (m.name, m.title, m.config.__name__, m.model.__name__)]
    root = Path(peft_multimodal.__file__).parent / place
    files = [root] if root.is_file() else list(root.rglob("*.py"))
    assert files
    named = {
        (str(file.relative_to(root.parent)), name)
        for file in files
        for name in names
        if re.search(rf"(?<![A-Za-z]){name}(?![a-z])", re.sub(r"(?m)^ *(>>>|\.\.\.) .*$", "", file.read_text("utf-8")))
    }
    assert named == set()


def test_a_reload_keeps_the_list():
    before = dict(registry.METHODS)
    importlib.reload(registry)
    assert before == registry.METHODS


def test_add_peft_type_is_idempotent():
    before = list(PeftType)
    assert registry.add_peft_type(NAMES[0]) is PeftType[NAMES[0]]
    assert registry.add_peft_type("LORA") is PeftType.LORA
    assert list(PeftType) == before


def test_another_package_of_the_same_name_is_named():
    name = NAMES[0]
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name]
    stranger = type("StrangeConfig", (peft.PeftConfig,), {"__module__": "stranger.methods"})
    with pytest.raises(RuntimeError, match=r"registered .*peft_multimodal"):
        registry.method(name.lower(), stranger, summary="", use=None, docs="", promises=registry.Promises())(
            mapping.PEFT_TYPE_TO_TUNER_MAPPING[name]
        )
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] is known


LORA = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "with":
    import peft_multimodal
import peft, torch
torch.set_num_threads(1)
from families import FAMILIES

family = FAMILIES["clip"]
torch.manual_seed(0)
model = peft.get_peft_model(family.build(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
model.base_model.model.logit_scale.requires_grad_(False)
loss = family.loss(model)
loss.backward()
for p in model.parameters():
    if p.grad is not None:
        p.data -= 0.1 * p.grad

def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()

NEW = json.loads(sys.argv[3])
state = peft.get_peft_model_state_dict(model)
functions = {}
for name in sorted(dir(peft)):
    item = getattr(peft, name)
    if isinstance(item, type) and item.__module__.startswith("peft."):
        functions[name] = {k: f"{getattr(v, '__module__', '')} {getattr(v, '__qualname__', type(v).__name__)}"
                           for k, v in vars(item).items() if not k.startswith("_abc") and k not in NEW}
mappings = {k: v.__module__ for k, v in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.items() if v.__module__.startswith("peft.")}
print(json.dumps([loss.item(), sorted(state), digest(state[k] for k in sorted(state)),
                  digest([family.output(model(**family.inputs(model)))]), functions, sorted(mappings.items())]))
"""


def test_stock_lora_and_stock_classes_are_the_same_with_and_without_the_package():
    without, with_ = (json.loads(python(LORA, TESTS, which, json.dumps(NAMES))) for which in ("without", "with"))
    assert with_[:4] == without[:4]
    assert without[4]["PeftModel"]
    assert with_[4] == without[4]
    assert with_[5] == without[5]


def test_no_stock_class_holds_our_code():
    for name in dir(peft):
        item = getattr(peft, name)
        if inspect.isclass(item) and item.__module__.startswith("peft."):
            for key, value in vars(item).items():
                assert not str(getattr(value, "__module__", "")).startswith("peft_multimodal"), (name, key)


def test_the_import_stays_light():
    code = """
import sys
import peft
before = set(sys.modules)
import peft_multimodal
new = {m.partition(".")[0] for m in set(sys.modules) - before}
print(sorted(new))
"""
    loaded = python(code)
    assert "peft_multimodal" in loaded
    for heavy in ("datasets", "matplotlib", "evaluate", "tensorly", "PIL", "pandas", "scipy"):
        assert f"'{heavy}'" not in loaded


def test_every_public_name_exists():
    for name in peft_multimodal.__all__:
        assert getattr(peft_multimodal, name) is not None
        assert name in dir(peft_multimodal)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = peft_multimodal.nonsense


def test_reload_keeps_running_models_alive(recwarn):
    family = FAMILIES["clip"]
    model = peft.get_peft_model(family.build(), METHODS["aurora_mode_approx"](family))
    importlib.reload(registry)
    with torch.no_grad():
        assert family.output(model(**family.inputs(model))).isfinite().all()
