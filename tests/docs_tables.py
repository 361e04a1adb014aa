"""The tables of the documentation that the registry writes: the README's table of methods, and the index of `docs/`.

python tests/docs_tables.py        # make docs-tables
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import peft_multimodal  # noqa: F401  registers the methods
from peft_multimodal.core.registry import METHODS, Method

ROOT = Path(__file__).parents[1]


def methods_table() -> str:
    """A row a method: when to take it."""
    rows = [
        (m.use.have, m.use.want, f"[{m.title}]({m.docs})", m.use.cost, m.use.compare)
        for m in _by_title(METHODS.values())
    ]
    merging = ", ".join(m.title for m in _by_title(METHODS.values()) if m.model.not_mergeable is None)
    return f"{_table(('you have', 'you want', 'take', 'cost', 'compare with'), rows)}\n\nMerged into the weights: {merging}."


def index() -> str:
    """Links to all pages of `docs/`: the guides, the methods with what they are for, and the rest."""
    methods = {Path(m.docs).name: m for m in _by_title(METHODS.values())}
    others = [p for p in (ROOT / "docs").glob("*.md") if p.name not in {*methods, "README.md"}]
    rows = [(f"[{m.title}]({name})", m.summary) for name, m in methods.items()]
    guides = _links((ROOT / "docs/guides").glob("*.md"))
    return f"Guides by task:\n\n{guides}\n\n{_table(('method', 'for'), rows)}\n\nMore:\n\n{_links(others)}"


TABLES: dict[str, Callable[[], str]] = {"README.md": methods_table, "docs/README.md": index}


def rewritten(page: str) -> str:
    """The page with its table between the markers as it should be."""
    text = (ROOT / page).read_text("utf-8")
    start, end = "<!-- make docs-tables -->\n", "<!-- end -->"
    assert text.find(start) < text.find(end), f"{page} has lost a marker: {start.strip()} and {end}"
    return re.sub(f"(?<={start}).*?(?={end})", lambda _: TABLES[page]() + "\n", text, flags=re.DOTALL)


def stale() -> list[str]:
    """Pages that the registry has left behind."""
    return [page for page in TABLES if rewritten(page) != (ROOT / page).read_text("utf-8")]


def _by_title(methods: Iterable[Method]) -> list[Method]:
    return sorted(methods, key=lambda m: m.title)


def _links(pages: Iterable[Path]) -> str:
    titles = {page.read_text("utf-8").splitlines()[0].removeprefix("# "): page for page in pages}
    return "\n".join(f"- [{title}]({titles[title].relative_to(ROOT / 'docs')})" for title in sorted(titles))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    for page in TABLES:
        Path(ROOT, page).write_text(rewritten(page), encoding="utf-8")
        print(f"wrote {os.path.relpath(ROOT / page)}")
