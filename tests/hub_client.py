"""What users do with the Hub, in a process of its own: the client reads HF_ENDPOINT when it is imported.

    HF_ENDPOINT=... HF_HOME=... python tests/hub_client.py STAGE FOLDER     # prints {what was done: "" or the traceback}

Stages are functions below, in the order of the file; FOLDER is what they share.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from case import declared
from families import FAMILIES
from huggingface_hub import HfApi, ModelCard
from methods import CASES, METHODS, distance, home, language, ready, run, stir, word_tokenizer, wrap
from peft import AutoPeftModel, PeftModel, get_peft_model

import peft_multimodal

OWNER, STRANGER = "hf_owner", "hf_stranger"  # tokens
CLASSES = ["w4 w5", "w6", 'w7 "w8" | w9']
METRICS = {"mean recall": 23.04, "R@1, text to image": "8.7 ± 0.4"}
NAMES = [method for method in METHODS if "-" not in method]  # every method once
REPOSITORIES = {method: f"owner/{method.replace('_', '-')}" for method in NAMES}

STAGES: dict[str, dict[str, Callable[[Path], None]]] = {}


def step(stage: str) -> Callable:
    return lambda function: STAGES.setdefault(stage, {}).setdefault(function.__name__, function)


def base(method: str) -> torch.nn.Module:
    return type(home(method).build()).from_pretrained(f"owner/tiny-{home(method).name.replace('_', '-')}")


def by_encoder(method: str) -> dict[str, str]:
    """The change of a config that names its encoder on the Hub, where the method has one."""
    return {"encoder": "owner/encoder"} if declared()[method].has("encoder") else {}


def adapted(method: str, **changes) -> PeftModel:
    model = wrap(home(method), method, base=base(method), **by_encoder(method), **changes)
    if declared()[method].promises.classes:
        model.set_classes(CLASSES, word_tokenizer())
    return model


def output(method: str, model: PeftModel) -> torch.Tensor:
    if declared()[method].promises.classes:
        model.set_classes(CLASSES, word_tokenizer())
    return run(home(method), model.eval())


def same(folder: Path, name: str, method: str, model: PeftModel) -> None:
    saved = torch.load(folder / f"{name}.pt")
    assert distance(output(method, model), saved) <= 1e-6
    with model.disable_adapter():
        assert distance(run(home(method), ready(model)), saved) > 1e-4 or declared()[method].promises.classes


def refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(peft_multimodal.AdapterError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------------ publish


@step("publish")
def base_models(folder: Path) -> None:
    for name in {home(method).name for method in NAMES}:
        FAMILIES[name].build().push_to_hub(f"owner/tiny-{name.replace('_', '-')}")
    word_tokenizer().push_to_hub("owner/tiny-clip")
    HfApi().create_repo("owner/encoder")
    HfApi().upload_folder(repo_id="owner/encoder", folder_path=language())


@step("publish")
def adapters(folder: Path) -> None:
    for method, repository in REPOSITORIES.items():
        model = adapted(method)
        torch.save(output(method, model), folder / f"{method}.pt")
        notes = peft_multimodal.CardNotes(metrics=METRICS, dataset="owner/emoji", license="apache-2.0")
        done = peft_multimodal.push_to_hub(model, repository, notes)
        assert done.oid == HfApi().model_info(repository).sha


@step("publish")
def by_the_stock_call(folder: Path) -> None:
    model = adapted("aurora_mode_approx")
    model.push_to_hub("owner/stock")
    torch.save(output("aurora_mode_approx", model), folder / "stock.pt")
    card = ModelCard.load(REPOSITORIES["structured_prompt"]).content
    adapted("structured_prompt").push_to_hub(REPOSITORIES["structured_prompt"])
    assert ModelCard.load(REPOSITORIES["structured_prompt"]).content == card, "a card that is there stays"


@step("publish")
def another_revision(folder: Path) -> None:
    model = stir(adapted("aurora_mode_approx"), seed=5)
    torch.save(output("aurora_mode_approx", model), folder / "v2.pt")
    peft_multimodal.push_to_hub(model, REPOSITORIES["aurora_mode_approx"], revision="v2")


@step("publish")
def languages_in_subfolders(folder: Path) -> None:
    family, method = FAMILIES["clip"], "cross_lingual_adapter"
    model = adapted(method, adapter_name="zh", save_encoder=True)
    model.add_adapter("ja", METHODS[method](family, encoder="owner/encoder"))
    stir(model, "ja", seed=3)
    for name in ("zh", "ja"):
        model.set_adapter(name)
        torch.save(output(method, model), folder / f"{name}.pt")
    peft_multimodal.push_to_hub(model, "owner/languages")


@step("publish")
def in_private(folder: Path) -> None:
    peft_multimodal.push_to_hub(adapted("aurora_mode_approx"), "owner/secret", private=True, token=OWNER)


@step("publish")
def with_a_base_at_a_local_path(folder: Path) -> None:
    base("aurora_mode_approx").save_pretrained(folder / "local-base")
    family = home("aurora_mode_approx")
    local = type(family.build()).from_pretrained(folder / "local-base")
    model = wrap(family, "aurora_mode_approx", base=local)
    torch.save(output("aurora_mode_approx", model), folder / "local.pt")
    peft_multimodal.push_to_hub(model, "owner/from-local")
    model.save_pretrained(folder / "adapter")
    HfApi().create_repo("owner/from-folder")
    HfApi().upload_folder(repo_id="owner/from-folder", folder_path=folder / "adapter")
    for repository in ("owner/from-local", "owner/from-folder"):
        assert str(folder) not in ModelCard.load(repository).content


@step("publish")
def what_its_owner_wrote_on_the_card_stays(folder: Path) -> None:
    repository = REPOSITORIES["aurora_mode_approx"]
    card = ModelCard.load(repository)
    card.text += "\nTrained on a laptop.\n"
    card.push_to_hub(repository)
    peft_multimodal.push_to_hub(adapted("aurora_mode_approx"), repository)
    again = ModelCard.load(repository)
    assert "Trained on a laptop." in again.text
    assert "| mean recall | 23.04 |" in again.text, "and so do metrics that are not given again"
    assert again.data.license == "apache-2.0"


@step("publish")
def foreign_adapters(folder: Path) -> None:
    contents = {"foreign": {"peft_type": "NONSENSE"}, "no-type": {"r": 8}, "no-weights": {"peft_type": "LORA"}}
    for name, config in contents.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        HfApi().create_repo(f"owner/{name}")
        HfApi().upload_folder(repo_id=f"owner/{name}", folder_path=folder / name)


# ---------------------------------------------------------------------------------------------------------------- use


@step("use")
@step("offline")
def every_method(folder: Path) -> None:
    for method, repository in REPOSITORIES.items():
        same(folder, method, method, peft_multimodal.load(base(method), repository))


@step("use")
def by_peft(folder: Path) -> None:
    for method, repository in REPOSITORIES.items():
        same(folder, method, method, PeftModel.from_pretrained(base(method), repository))
    same(folder, "stock", "aurora_mode_approx", PeftModel.from_pretrained(base("aurora_mode_approx"), "owner/stock"))


@step("use")
@step("offline")
def by_auto_classes(folder: Path) -> None:
    for method, repository in REPOSITORIES.items():
        same(folder, method, method, AutoPeftModel.from_pretrained(repository))


@step("use")
@step("offline")
def a_second_adapter(folder: Path) -> None:
    for method, repository in REPOSITORIES.items():
        model = get_peft_model(base(method), METHODS[method](home(method), **by_encoder(method)))
        model.load_adapter(repository, adapter_name="other")
        model.set_adapter("other")
        same(folder, method, method, model)


@step("use")
@step("offline")
def a_revision(folder: Path) -> None:
    method = "aurora_mode_approx"
    same(folder, "v2", method, peft_multimodal.load(base(method), REPOSITORIES[method], revision="v2"))
    same(folder, "v2", method, PeftModel.from_pretrained(base(method), REPOSITORIES[method], revision="v2"))


@step("use")
@step("offline")
def subfolders(folder: Path) -> None:
    method = "cross_lingual_adapter"
    for name in ("zh", "ja"):
        model = peft_multimodal.load(base(method), "owner/languages", subfolder=name, adapter_name=name)
        assert model.active_adapters == [name]
        same(folder, name, method, model)


@step("use")
def with_a_private_token(folder: Path) -> None:
    method = "aurora_mode_approx"
    for token in (None, STRANGER):
        refused(
            "Hub doesn't give it.*token=",
            lambda token=token: peft_multimodal.load(base(method), "owner/secret", token=token),
        )
    same(folder, method, method, peft_multimodal.load(base(method), "owner/secret", token=OWNER))


@step("use")
def with_a_base_at_another_path(folder: Path) -> None:
    for repository in ("owner/from-local", "owner/from-folder"):
        same(folder, "local", "aurora_mode_approx", peft_multimodal.load(base("aurora_mode_approx"), repository))


@step("use")
def snippets_run_as_printed(folder: Path) -> None:
    for repository in [*REPOSITORIES.values(), "owner/languages"]:
        card = ModelCard.load(repository)
        (snippet,) = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)
        assert "import peft_multimodal" in snippet
        names: dict = {}
        exec(snippet, names)
        method = next((m for m, r in REPOSITORIES.items() if r == repository), None)
        if method is not None:
            same(folder, method, method, names["model"])
        else:
            assert set(names["model"].peft_config) == {"zh", "ja"}
        if method is not None and declared()[method].promises.classes:
            assert names["classes"] == CLASSES


@step("use")
def what_is_not_there_is_explained(folder: Path) -> None:
    model = base("aurora_mode_approx")
    repository = REPOSITORIES["aurora_mode_approx"]
    refused(
        "'owner/nothing' is no folder, and the Hub doesn't give it",
        lambda: peft_multimodal.load(model, "owner/nothing"),
    )
    refused("revision 'v9'.*Check the name", lambda: peft_multimodal.load(model, repository, revision="v9"))
    refused(
        "subfolder 'fr' on the Hub has no adapter_config",
        lambda: peft_multimodal.load(model, repository, subfolder="fr"),
    )
    refused("has no adapter_config.json: it is no adapter", lambda: peft_multimodal.load(model, "owner/encoder"))
    refused("names the method 'NONSENSE'", lambda: peft_multimodal.load(model, "owner/foreign"))
    refused("has no peft_type", lambda: peft_multimodal.load(model, "owner/no-type"))
    refused("has no adapter_model.safetensors", lambda: peft_multimodal.load(model, "owner/no-weights"))
    refused("no folder '/nowhere/adapter'", lambda: peft_multimodal.load(model, "/nowhere/adapter"))


@step("offline")
def what_was_never_downloaded(folder: Path) -> None:
    refused(
        "isn't in the cache.*Download it once",
        lambda: peft_multimodal.load(torch.nn.Linear(1, 1), "owner/from-nowhere"),
    )


# -------------------------------------------------------------------------------------------------------------- local


@step("local")
def nothing_asks_the_network(folder: Path) -> None:
    """With a base in a folder or without a name, on a machine that thinks that it is online."""

    def guard(event: str, arguments: tuple) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            raise AssertionError(f"the network was asked: {event} {arguments}")

    sys.addaudithook(guard)
    for name, method in ((home(m).name, m) for m in NAMES):
        assert (name, method) in CASES
        family = FAMILIES[name]
        family.build().save_pretrained(folder / method / "base")
        for built in (family.build(), type(family.build()).from_pretrained(folder / method / "base")):
            model = wrap(family, method, base=built)
            expected = output(method, model)
            peft_multimodal.save(model, folder / method / "ours")
            model.save_pretrained(folder / method / "stock")
            for place in ("ours", "stock"):
                for load in (peft_multimodal.load, PeftModel.from_pretrained):
                    assert distance(output(method, load(family.build(), folder / method / place)), expected) <= 1e-6
            model.load_adapter(folder / method / "ours", "again")


# ------------------------------------------------------------------------------------------------------------- fields


@step("fields")
def only_the_named_encoder_is_asked_for(folder: Path) -> None:
    """Whatever field of a config names a repository, on a machine that is online."""
    asked: set[tuple[str, str]] = set()
    at = ("", "")

    def note(event: str, arguments: tuple) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            asked.add(at)

    sys.addaudithook(note)
    for method in NAMES:
        place = folder / "fields" / method
        model = home(method).build()
        peft_multimodal.save(wrap(home(method), method), place)
        written = json.loads((place / "adapter_config.json").read_text())
        for field in [*written, "auto_map", "trust_remote_code", "processor", "tokenizer"]:
            at = method, field
            for value in (
                "stranger/repository",
                ["stranger/repository"],
                {"stranger/repository": "stranger/repository"},
            ):
                changed = {**written, field: value}
                (place / "adapter_config.json").write_text(json.dumps(changed))
                with suppress(ValueError):
                    peft_multimodal.load(model, place).unload()
    assert asked == {(method, field) for method in NAMES for field in by_encoder(method)}


def attempt(function: Callable[[Path], None], folder: Path) -> str:
    torch.manual_seed(0)
    try:
        function(folder)
    except (Exception, pytest.fail.Exception):
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = STAGES[sys.argv[1]].items()
    print(json.dumps({name: attempt(function, Path(sys.argv[2])) for name, function in steps}))
