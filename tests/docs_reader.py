"""Does what a page of the documentation says, block after block, in a process of its own.

    python tests/docs_reader.py README.md docs/faq.md   # in an empty folder: each page in a process and a folder of its own
    python tests/docs_reader.py peft_multimodal         # the examples of `help()`

The last line is {page: {"done": [the lines of its blocks, or the names with examples], "error": what stopped it}}.

Python blocks run in one namespace, and in a new one for each section of a page that says so: `STAND_ALONE`. Names that a
page uses without making them are the reader's own data: `GIVEN`. An example of a docstring may also use a model that is at
hand (`AT_HAND`) and every public name. Files shown in a block (```csv pairs.csv) are written. Of commands the doctor runs; of the others, which take minutes or
change the machine, what they name has to exist. There is no other kind of block.
"""

from __future__ import annotations

import ast
import doctest
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs_models import NAMES, SIDE
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
STEPS = 2
STAND_ALONE = "Each section's code runs by itself."  # a page with this sentence is read section by section


# --- pages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of the page that it begins after, what its fence says, its text, and its section."""

    line: int
    info: str
    text: str
    section: str = ""


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page; indented fences belong to lists."""
    found, start, opened, section = [], 0, None, ""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if (fence := re.match(r"\s*```(.*)", line)) is None:
            section = line if opened is None and line.startswith("## ") else section
            continue
        if opened is None:
            start, opened = number, fence.group(1).strip()
        else:
            found.append(Block(start, opened, "\n".join(lines[start : number - 1]) + "\n", section))
            opened = None
    assert opened is None, f"{page}: the block of line {start} has no end"
    return found


def do(page: str, block: Block, namespace: dict[str, Any]) -> None:
    kind, _, file = block.info.partition(" ")
    if kind == "python" and not file:
        give(block.text, namespace)
        exec(compile("\n" * block.line + block.text, page, "exec"), namespace)
    elif kind in ("csv", "jsonl") and file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(block.text, encoding="utf-8")
    elif kind == "bibtex" and not file:
        entries = [line for line in block.text.splitlines() if line]
        assert all(re.fullmatch(r"@\w+{\w+, .*title={.+}.*}", entry) for entry in entries), f"{page}, line {block.line}"
    elif kind == "sh" and not file:
        for command in commands(block.text):
            check_command(command)
    else:
        raise AssertionError(f"{page}, line {block.line}: nobody knows what to do with a block of {block.info!r}")


# --- commands --------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    split = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [command for command in split if command]


def check_command(command: list[str]) -> None:
    """Run the doctor; of other commands see that what they name is there.

    Raises:
        AssertionError: it isn't, the doctor found a problem, or this isn't one of the commands that are known here.
    """
    match command:
        case ["python", "-m", "peft_multimodal", *arguments]:
            from peft_multimodal.__main__ import main

            assert main(arguments) == 0, command
        case ["make", *targets] if targets:
            subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
        case ["pip", "install", wanted] if place := re.fullmatch(r"(?:\.|peft-multimodal)(?:\[([\w,]+)\])?", wanted):
            extras = importlib.metadata.metadata("peft-multimodal").get_all("Provides-Extra")
            assert {*(place.group(1) or "").split(",")} <= {"", *extras}, command
        case ["python", "-m", "benchmarks.run", *arguments]:
            check_run(arguments)
        case ["python", "-m", "benchmarks.assets", *names]:
            from benchmarks.assets import __main__ as assets

            assert {*names} <= {*assets.NAMES, "all"}, command
        case ["python", "-m", module] if module.startswith("benchmarks."):
            assert importlib.util.find_spec(module), command
        case _:
            raise AssertionError(f"nobody knows how to check the command {shlex.join(command)!r}")


def check_run(arguments: list[str]) -> None:
    """`python -m benchmarks.run` takes these arguments, and the experiments that they name exist."""
    from benchmarks import experiment, run

    options = run._parser().parse_args(arguments)
    named = {*(options.experiment or ())} - {"all"}
    assert not named or named <= {*experiment.names(options.task)}, arguments


# --- the reader's own data -------------------------------------------------------------------------------------------


def image(name: str) -> Image.Image:
    """A disc of the name's colour, and for each name another size."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    rest = 2 + list(NAMES).index(name)
    ImageDraw.Draw(image).ellipse((rest, rest, SIDE - rest, SIDE - rest), fill=name.split()[0], outline="black")
    return image


def captioned(**columns: list[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {"image": [image(name) for name in NAMES], "text": [f"a {name}" for name in NAMES]} | columns
    )


def pixels(*names: str) -> Any:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained("openai/clip-vit-base-patch32")
    return processor([image(name) for name in names], return_tensors="pt").pixel_values


def folders_of_images() -> None:
    """images/1.png and questions/1.png, ..., and the same by class: classes/<name>/1.png."""
    for number, name in enumerate(NAMES, 1):
        for path in (f"images/{number}.png", f"questions/{number}.png", f"classes/{name}/1.png"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            image(name).save(path)


GIVEN: dict[str, Callable[[], Any]] = {
    "my_dataset": captioned,
    "dataset": lambda: captioned(id=[f"pair-{i}" for i in range(len(NAMES))]),
    "pairs": lambda: [{"source": english, "target": chinese} for english, chinese in NAMES.items()],
    "few_shot": lambda: [
        {"pixel_values": pixels(name)[0], "labels": label} for label, name in enumerate(("red apple", "green apple"))
    ],
    "rows": lambda: [{"text": "<image>what colour is it?", "answer": f" a {n}", "images": [image(n)]} for n in NAMES],
    "apple": lambda: image("red apple"),
    "pear": lambda: image("green pear"),
    "x": lambda: pixels("red apple", "green apple"),
}


def clip() -> Any:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained("openai/clip-vit-base-patch32")


def adapted() -> Any:
    from peft import get_peft_model

    import peft_multimodal

    return get_peft_model(clip(), peft_multimodal.AuroraModeApproxConfig(r=8))


def collator() -> Any:
    from transformers import AutoProcessor

    import peft_multimodal

    processor = AutoProcessor.from_pretrained("openai/clip-vit-base-patch32")
    return peft_multimodal.ImageTextCollator(processor, model=clip())


def language_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")


AT_HAND = {**GIVEN, "clip": clip, "collator": collator, "lm": language_model, "model": adapted}


def give(code: str, namespace: dict[str, Any], given: dict[str, Callable[[], Any]] = GIVEN) -> None:
    """Put the data into the namespace that the code names and that isn't there."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    made = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    for name in ({node.id for node in nodes} & given.keys()) - namespace.keys() - (made if given is AT_HAND else set()):
        namespace[name] = given[name]()


# --- help() ----------------------------------------------------------------------------------------------------------


def example_of(name: str) -> str:
    """The code of a public name's example."""
    import peft_multimodal

    found = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(peft_multimodal, name)) or "")
    return "".join(example.source for example in found)


def do_examples() -> list[str]:
    """Run the examples of all public names, each in a namespace of its own; the names."""
    import peft_multimodal

    done = []
    for name in sorted({*peft_multimodal.__all__} - {"__version__"}):
        code = example_of(name)
        namespace = {"__name__": "__main__"} | {n: getattr(peft_multimodal, n) for n in peft_multimodal.__all__}
        give(code, namespace, AT_HAND)
        exec(compile(code, f"help({name})", "exec"), namespace)
        done += [name] if code else []
    return done


def few_steps() -> None:
    """Training takes `STEPS` steps, whatever a page says."""
    from transformers import TrainingArguments

    full = TrainingArguments.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        full(self, *args, **{**kwargs, "max_steps": STEPS})

    TrainingArguments.__init__ = init


def read(page: str) -> list[Any]:
    """Do a page; gives the lines of its blocks, or the names with examples."""
    few_steps()
    folders_of_images()
    if page == "peft_multimodal":
        return do_examples()
    alone = STAND_ALONE in (ROOT / page).read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    section, done = None, []
    for block in blocks(page):
        if section is None or (alone and block.section != section):
            section, namespace = block.section, {"__name__": "__main__"}
        do(page, block, namespace)
        done.append(block.line)
    return done


def main(pages: list[str]) -> None:
    """Each page in a fork of this process, which has loaded all that takes long."""
    for slow in ("datasets", "peft", "torch", "transformers.trainer"):
        importlib.import_module(slow)
    results = {}
    for number, page in enumerate(pages):
        folder = Path(f"page-{number}").absolute()
        folder.mkdir()
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            result: dict[str, Any] = {"done": [], "error": ""}
            try:
                result["done"] = read(page)
            except BaseException:
                result["error"] = traceback.format_exc()
            (folder / "result.json").write_text(json.dumps(result))
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        file = folder / "result.json"
        killed = {"done": [], "error": f"the process ended with status {status}"}
        results[page] = json.loads(file.read_text()) if file.is_file() else killed
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
