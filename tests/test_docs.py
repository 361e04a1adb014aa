"""The documentation does what it says: every block of every page is carried out, every link leads somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docs_tables
import pytest
from docs_models import MODELS
from docs_reader import ROOT, Block, blocks, check_command, commands, do
from hub_server import Hub

import peft_multimodal
from peft_multimodal.core.registry import METHODS

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
COMMANDS_ALONE = ["CONTRIBUTING.md", "benchmarks/README.md"]


@dataclass(frozen=True)
class Desk:
    """Where pages are read: the Hub that serves the models they name, and a cache that starts empty."""

    hub: Hub
    home: Path

    def environment(self) -> dict[str, str]:
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
        places = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        return {**ours, **quiet, **places, "HF_TOKEN": "hf_user", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with Hub(tokens={"hf_user": "user"}) as hub:
        for name, make in MODELS.items():
            folder = tmp_path_factory.mktemp("model")
            make(folder)
            hub.publish(name, folder)
        yield Desk(hub, tmp_path_factory.mktemp("home"))


def test_every_block_and_every_example_is_carried_out(desk: Desk, tmp_path: Path):
    wanted: dict[str, list] = {page: [block.line for block in blocks(page)] for page in PAGES}
    wanted["peft_multimodal"] = sorted({*peft_multimodal.__all__} - {"__version__"})
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/docs_reader.py"), *wanted]
    done = subprocess.run(
        command, cwd=tmp_path, env=desk.environment(), capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    assert not (errors := {page: result["error"] for page, result in read.items() if result["error"]}), errors
    assert {page: result["done"] for page, result in read.items()} == wanted


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_s_page_has_all_that_a_reader_looks_for(name: str):
    page = (ROOT / METHODS[name].docs).read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    wanted = ["When to use it", "How it works", "Options", "Cost", "Limits", "Results"]
    assert [heading for heading in headings if heading in wanted] == wanted
    how, results = (page.split(f"\n## {heading}\n")[1].split("\n## ")[0] for heading in ("How it works", "Results"))
    assert re.search(r"^    \S", how, re.MULTILINE), "no equation"
    assert "python -m benchmarks." in results


def test_tables_of_methods_are_the_registry():
    assert not docs_tables.stale(), "run `make docs-tables`"


@pytest.mark.parametrize("page", COMMANDS_ALONE)
def test_every_command_names_what_exists(page: str):
    for block in blocks(page):
        for command in commands(block.text):
            check_command(command)


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ("", "python -m peft_multimodal doctor NAME"),
        ("text", "what a program printed"),
        ("csv", "a,table,without,a,name"),
        ("python", "raise AssertionError"),
        ("sh", "make no-such-target"),
        ("sh", "pip install .[no-such-extra]"),
        ("sh", "python -m benchmarks.run --task retrieval --experiment lora/no-such"),
        ("sh", "python -m benchmarks.assets no-such-asset"),
        ("sh", "python -m benchmarks.no_such_module"),
        ("sh", "curl https://example.org"),
    ],
)
def test_a_block_that_is_wrong_or_that_nobody_can_do_is_an_error(info: str, text: str):
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        do("a page", Block(1, info, text), {})


def anchors(page: Path) -> set[str]:
    """What links to a page's headings end in, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *COMMANDS_ALONE, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
