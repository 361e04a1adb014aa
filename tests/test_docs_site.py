"""The documentation's site: built in strict mode, without the network, and no link of it leads nowhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocstrings")

import docs_site

import peft_multimodal
from peft_multimodal.core.registry import METHODS

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """What a page of HTML links to, loads and can be linked to at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values: dict[str, Any] = dict(attrs)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("link", "script", "img", "iframe", "source"):
            self.loads += [values[name] for name in ("href", "src") if values.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in sorted(folder.rglob("*.html"))}


def targets(page: Page, links: list[str]) -> Iterator[tuple[str, Path, str]]:
    """Links within the site: as they stand, the file that they lead to, and the anchor."""
    for link in links:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc:
            yield link, (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path, parts.fragment


def test_no_link_leads_nowhere(site: dict[Path, Page]):
    pages = {path.resolve(): page for path, page in site.items()}
    broken = []
    for page in site.values():
        if page.path.name == "404.html":  # its links begin at the root of a server
            continue
        for link, target, anchor in targets(page, [*page.links, *page.loads]):
            known = pages.get(target)
            if not target.exists() or (known is not None and unquote(anchor) not in known.anchors):
                broken.append((page.path.name, link))
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]):
    loads = {link for page in site.values() for link in page.loads}
    assert loads
    assert not {link for link in loads if urlsplit(link).netloc}


def test_the_reference_has_every_public_name_and_no_other(site: dict[Path, Page]):
    pages = [page for path, page in site.items() if path.parent.name == "api"]
    names = {a.removeprefix("peft_multimodal.") for page in pages for a in page.anchors if a.count(".") == 1}
    assert names | {"__version__"} == {*peft_multimodal.__all__}


def test_every_method_is_in_the_navigation(site: dict[Path, Page]):
    start = next(
        page for path, page in site.items() if path.name == "index.html" and path.parent.name.startswith("site")
    )
    assert {m.docs.replace(".md", ".html") for m in METHODS.values()} <= {*start.links}


def test_what_github_reads_is_read_alike():
    page = "<!-- a comment -->\n| `a\\|b` |\n\n```csv a.csv\n1\n```\n"
    assert docs_site.on_page_markdown(page) == '\n\n| `a|b` |\n\n```csv title="a.csv"\n1\n```\n'


def test_a_page_that_no_file_lists_is_in_the_navigation():
    class Config:
        nav: list[dict[str, Any]] = [{"Methods": []}, {"More": []}, {"API reference": []}]

    sections = {title: pages for entry in docs_site.on_config(Config()).nav for title, pages in entry.items()}
    assert "docs/training.md" in sections["More"]
    assert not {m.docs for m in METHODS.values()} & {*sections["More"]}
