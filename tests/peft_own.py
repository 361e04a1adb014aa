"""PEFT's own common tests on every registered method, with tiny models; what they refuse is compared with a kept list.

`make test-peft` fetches the tests (the sdist of the installed PEFT, into build/) and runs this; pytest doesn't collect it.
Where LoRA fails on a model, PEFT's test isn't meant for it, and is left out. `peft_own.json` has the rest of the failures,
{method on family: {test: error}}: a new one fails the run, one that works now is told.

    python tests/peft_own.py FOLDER            # that holds PEFT's tests/
    python tests/peft_own.py FOLDER --write    # take what fails now as the list
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import sys
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers as hf
from _pytest.outcomes import OutcomeException, Skipped
from families import BOS, FAMILIES, WORDS, Family
from methods import METHODS, ready, stir
from peft import LoraConfig, PeftConfig

LIST = Path(__file__).with_suffix(".json")
WHOLE = {
    "clip": "visual_projection",
    "blip_retrieval": "itm_head",
    "llava": "multi_modal_projector",
    "llama": "lm_head",
}
OPTIONS = {"dtype": (torch.float16, torch.bfloat16), "use_reentrant": (True, False), "raises_err": (False,)}


def lora(family: Family, **changes: Any) -> PeftConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "query", "value"], init_lora_weights=False, **changes)


def inputs(name: str) -> dict[str, Any]:
    """Without BOS, by which tests of this package mark an image: PEFT's tests bring none."""
    batch = FAMILIES[name].inputs()
    return {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == BOS, WORDS[0])}


def configs() -> Iterator[tuple[str, str, PeftConfig]]:
    """(method, model, config), LoRA first; each also with a module that is trained beside it."""
    for method, make in {"lora": lora, **METHODS}.items():
        for name, whole in WHOLE.items():
            task = {"task_type": "CAUSAL_LM"} if name == "llama" else {}
            if (config := make(FAMILIES[name], **task)) is not None:
                yield method, name, config
                yield f"{method} and a module", name, make(FAMILIES[name], modules_to_save=[whole], **task)


def given(config: PeftConfig) -> dict[str, Any]:
    """The arguments that a config was made with."""
    values = {}
    for field in fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.init and field.name not in ("peft_type", "package_version") and getattr(config, field.name) != default:
            values[field.name] = getattr(config, field.name)
    return values


def common_tests(folder: Path) -> types.ModuleType:
    """PEFT's tests/testing_common.py, whose models aren't at their start: there most adapters are the identity."""
    sys.path.insert(0, str(folder))
    pipelines = types.ModuleType("diffusers")
    pipelines.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    with mock.patch.dict(sys.modules, {} if "diffusers" in sys.modules else {"diffusers": pipelines}):
        from tests import testing_common as common

    def stirred(model: Any, config: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
        wrapped = ready(peft.get_peft_model(model, config, adapter_name, **kwargs))
        return wrapped if isinstance(config, LoraConfig) else stir(wrapped, adapter_name)

    def add_adapter(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        own(self, adapter_name, peft_config, *args, **kwargs)
        if not isinstance(peft_config, LoraConfig):
            stir(self, adapter_name, seed=len(self.peft_config))

    own, peft.PeftModel.add_adapter = peft.PeftModel.add_adapter, add_adapter

    class Readied(peft.PeftModel):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return ready(peft.PeftModel.from_pretrained(*args, **kwargs))

    common.get_peft_model, common.PeftModel = stirred, Readied
    return common


class Tiny:
    """In place of a transformers class: knows the models of the Hub ids tiny/clip, ..., which lie in a folder."""

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name
        FAMILIES[name].build().save_pretrained(f"{folder}/{name}")

    def from_pretrained(self, path: str, **kwargs: Any) -> Any:
        at_hub = path == f"tiny/{self.name}"
        made: Any = type(FAMILIES[self.name].build())
        model = made.from_pretrained(f"{self.folder}/{self.name}" if at_hub else path, **kwargs)
        if at_hub:
            model.name_or_path = model.config._name_or_path = path
        return model


def calls(tester: type) -> Iterator[tuple[str, Callable[..., None], dict[str, Any]]]:
    """(name, test, its own options) of all tests that take a model and a config."""
    for name, test in inspect.getmembers(tester, inspect.isfunction):
        parameters = list(inspect.signature(test).parameters)[1:]
        if not name.startswith("_test_") or parameters[:3] != ["model_id", "config_cls", "config_kwargs"]:
            continue
        option = next((p for p in parameters[3:] if p in OPTIONS), None)
        for value in OPTIONS[option] if option else (None,):
            yield name[6:] + (f"[{value}]" if option else ""), test, {option: value} if option else {}


def outcome(test: Callable[[], None], folder: str) -> str:
    """ "passed", "skipped", or the error in short."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test()
    except Skipped:
        return "skipped"
    except (Exception, OutcomeException) as error:
        message = re.sub(r"\s+", " ", str(error)).replace(folder, "").strip()
        return f"{type(error).__name__}: {re.sub('/tmp/[^ ]*', '', message)[:150]}"
    return "passed"


def run_all(common: types.ModuleType) -> tuple[Counter[str], dict[str, dict[str, str]]]:
    """How many passed, were skipped, left out and failed; and the failures."""
    counts: Counter[str] = Counter()
    failed: dict[str, dict[str, str]] = {}
    beyond_lora: set[tuple[str, ...]] = set()  # (model, variant, test)
    with tempfile.TemporaryDirectory() as folder:
        classes = {name: Tiny(folder, name) for name in WHOLE}
        for method, name, config in configs():
            tester = type("Tester", (common.PeftCommonTester,), {"torch_device": "cpu"})()
            tester.transformers_class = classes[name]
            tester.prepare_inputs_for_testing = functools.partial(inputs, name)
            for title, test, options in calls(type(tester)):
                arguments = (f"tiny/{name}", type(config), given(config))
                result, place = "left out", (name, method.partition(" ")[2], title)
                if place not in beyond_lora:
                    result = outcome(lambda: test(tester, *arguments, **options), folder)  # noqa: B023
                if method.startswith("lora"):
                    beyond_lora |= {place} if result not in ("passed", "skipped") else set()
                    continue
                counts[result if result in ("passed", "skipped", "left out") else "failed"] += 1
                if ":" in result:
                    failed.setdefault(f"{method} on {name}", {})[title] = result
    return counts, failed


def main(folder: Path, write: bool) -> int:
    torch.set_num_threads(1)
    hf.utils.logging.disable_progress_bar()
    counts, failed = run_all(common_tests(folder))
    print(f"peft {peft.__version__}, transformers {hf.__version__}:", ", ".join(f"{n} {k}" for k, n in counts.items()))
    if write:
        LIST.write_text(json.dumps({"peft": peft.__version__, "counts": counts, "failed": failed}, indent=1) + "\n")
        return 0
    kept = json.loads(LIST.read_text())
    before = {(case, test): error for case, tests in kept["failed"].items() for test, error in tests.items()}
    now = {(case, test): error for case, tests in failed.items() for test, error in tests.items()}
    new = {key: error for key, error in now.items() if error.split(":")[0] != before.get(key, "").split(":")[0]}
    for (case, test), error in new.items():
        print(f"FAILED {case}: {test}: {error}")
    for case, test in before.keys() - now.keys():
        print(f"works now, take it out of {LIST.name}: {case}: {test}")
    missing = kept["peft"] == peft.__version__ and sum(kept["counts"].values()) - counts.total()
    if missing:
        print(f"{missing} tests fewer than the {sum(kept['counts'].values())} of the list: they aren't found any more")
    return bool(new) or bool(missing)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "--write" in sys.argv))
