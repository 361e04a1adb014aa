"""The hook that `mkdocs.yml` names: which pages the documentation's site has (`make docs`).

- Pages keep the paths that they have in the repository, so their links work there and on the site.
- Pages of methods come from the registry, the API reference from `peft_multimodal.__all__`.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import FunctionType
from typing import Any

from mkdocs.structure.files import File, Files
from peft.tuners.tuners_utils import BaseTuner

import peft_multimodal
from peft_multimodal.core.registry import METHODS
from peft_multimodal.core.tuner import MultimodalTuner

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "examples/README.md",
)  # pages that aren't in docs/
REFERENCE = {  # title of a page of the API reference: the modules that its names are defined in
    "Models": ("core",),
    "Methods": ("methods", "nn"),
    "Data": ("data", "images", "interleaved"),
    "Training": ("training", "policy"),
    "Evaluation": ("evaluation",),
    "Saving and loading": ("files", "_version"),
}


def on_config(config: Any) -> Any:
    """Fill in the parts of the navigation that no file lists."""
    sections = {title: pages for entry in config.nav for title, pages in entry.items()}
    sections["Methods"] += [{m.title: m.docs} for m in sorted(METHODS.values(), key=lambda m: m.title)]
    sections["API reference"] += [{title: reference_path(title)} for title in REFERENCE]
    listed = {path for pages in sections.values() for path in _paths(pages)}
    sections["More"] += sorted({page for page in pages() if page.startswith("docs/")} - listed)
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages and what they link to, under the repository's paths, and the theme's own files."""
    site = [file for file in files if file.src_dir != config.docs_dir]
    linked = {path for page in pages() for path in links(page)}
    site += [File.generated(config, path, abs_src_path=str(ROOT / path)) for path in sorted({*pages(), *linked})]
    site += [File.generated(config, reference_path(title), content=reference(title)) for title in REFERENCE]
    return Files(site)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What GitHub reads and Python-Markdown doesn't: comments beside tables, bars in their code, names of files on fences."""
    markdown = re.sub(r"^<!-- .* -->$", "\n", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"`[^`\n]+`", lambda code: code[0].replace("\\|", "|"), markdown)
    return re.sub(r"^```(\w+) (\S+)$", r'```\1 title="\2"', markdown, flags=re.MULTILINE)


def pages() -> list[str]:
    """Paths of the Markdown pages, in the repository and on the site."""
    return [*OUTSIDE, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


def links(page: str) -> set[str]:
    """Paths of the files, other than pages, that a page links to."""
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = {(ROOT / page).parent / link for link in re.findall(r"\]\(([^)\s#:]+)\)", text)}
    return {str(t.resolve().relative_to(ROOT)) for t in targets if t.is_file() and t.suffix != ".md"}


def reference_path(title: str) -> str:
    return f"api/{title.lower().replace(' ', '-')}.md"


def reference(title: str) -> str:
    """A page of the API reference: what mkdocstrings shall read, name by name."""
    names = [name for name in sorted(peft_multimodal.__all__) if part_of(name) in REFERENCE[title]]
    return "\n\n".join([f"# {title}", *(_entry(name) for name in names)])


def part_of(name: str) -> str:
    """The part of the package that defines a public name."""
    return getattr(getattr(peft_multimodal, name), "__module__", "peft_multimodal._version").split(".")[1]


def members(cls: type) -> list[str]:
    """Public methods of a class that its users call: documented, and no hook that the author of a method fills in."""
    hooks = {*dir(MultimodalTuner)} - {*dir(BaseTuner)} if issubclass(cls, MultimodalTuner) else set()
    calls = (FunctionType, classmethod, staticmethod, property)
    return [
        name
        for name, member in vars(cls).items()
        if not name.startswith("_") and name not in hooks and isinstance(member, calls) and member.__doc__
    ]


def _entry(name: str) -> str:
    if name == "__version__":
        return "## `__version__`\n\nThe version of the package, a string."
    value = getattr(peft_multimodal, name)
    chosen = members(value) if isinstance(value, type) else []
    return f"::: peft_multimodal.{name}\n    options:\n      members: {chosen or 'false'}"


def _paths(section: Any) -> list[str]:
    return [path for entry in section for path in (entry.values() if isinstance(entry, dict) else [entry])]
