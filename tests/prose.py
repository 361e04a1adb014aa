"""How users are written to: no sentence above `LONGEST` words, and no word that the house gave up.

    python tests/prose.py        # make prose

Read are the README, the pages of docs/, the newest section of the changelog, the docstrings of public names and their
methods, and the messages of errors and warnings. A piece of code counts as one word.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import peft_multimodal

ROOT = Path(__file__).parents[1]
LONGEST = 36
GIVEN_UP = {  # a word or phrase, and what we write instead
    r"pictur\w*": "image",
    r"anew": "again, or from the start",
    r"shall": "say what happens",
    r"in vain": "without effect",
    r"whoever": "name the person: you, the user",
    r"(?:somebody|nobody|anybody)(?:'s)?": "name who: you, the model, nothing",
    r"of (?:above|before|old)": "above, earlier",
    r"as ever": "as usual",
    r"where(?:in|of|by|upon)": "in which, of which",
    r"there(?:of|by|upon|in)": "of it, by it",
    r"said where": "say it in its own sentence",
    r"learnt": "learned",
    r"(?:its|their|his) like": "similar ones, by name",
}
FORBIDDEN = re.compile(rf"\b(?:{'|'.join(GIVEN_UP)})\b", re.IGNORECASE)
CODE = re.compile(r"``.+?``|`[^`]*`")
ENDS = re.compile(r"""(?<=[.!?])["')\]*]*\s+(?=["'(\[*_]*[A-Z0-9]|[`"])""")


@dataclass(frozen=True)
class Text:
    """A piece of text that stands by itself: a paragraph, an item of a list, a cell, a message."""

    place: str
    text: str


@dataclass(frozen=True)
class Fault:
    place: str
    what: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}: {self.sentence}"


def faults(text: Text) -> Iterator[Fault]:
    """What is wrong with a text's sentences."""
    for sentence in sentences(text.text):
        if (count := words(sentence)) > LONGEST:
            yield Fault(text.place, f"{count} words", sentence)
        for word in FORBIDDEN.findall(CODE.sub("code", sentence)):
            instead = next(new for old, new in GIVEN_UP.items() if re.fullmatch(old, word, re.IGNORECASE))
            yield Fault(text.place, f"{word!r}, write {instead!r}", sentence)


def sentences(text: str) -> list[str]:
    """A text without markup, sentence by sentence."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))
    return [sentence for sentence in ENDS.split(text) if sentence]


def words(sentence: str) -> int:
    return sum(any(map(str.isalnum, word)) for word in CODE.sub("code", sentence).split())


# --- where texts stand -----------------------------------------------------------------------------------------------


def texts() -> Iterator[Text]:
    """All that is read."""
    for page in ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))):
        yield from page_texts(page, (ROOT / page).read_text(encoding="utf-8"))
    yield from page_texts("CHANGELOG.md", newest_section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    for name in sorted(peft_multimodal.__all__):
        yield from docstrings(name, getattr(peft_multimodal, name))
    for path in sorted(Path(peft_multimodal.__file__).parent.rglob("*.py")):
        yield from messages(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


def page_texts(page: str, markdown: str) -> Iterator[Text]:
    """Paragraphs, items of lists and cells of tables of a Markdown page; no code."""
    start, lines, fenced = 0, list[str](), False
    for number, line in enumerate([*markdown.splitlines(), ""], 1):
        opens = re.match(r"\s*```", line) is not None
        fenced ^= opens
        alone = opens or fenced or not line.strip() or re.match(r"#|<!--|\||    \S", line)
        if lines and (alone or re.match(r"\s*(?:[-*]|\d+\.) ", line)):
            yield Text(f"{page}:{start}", " ".join(lines))
            lines = []
        if re.match(r"\|", line) and not fenced:
            cells = re.split(r"(?<!\\)\|", line)
            yield from (Text(f"{page}:{number}", cell) for cell in cells if re.search(r"\w", cell))
        elif not alone:
            start = start if lines else number
            lines.append(line.strip())


def newest_section(changelog: str) -> str:
    """The changelog down to the second of its versions."""
    return "\n## ".join(changelog.split("\n## ")[:2])


def docstrings(name: str, value: object) -> Iterator[Text]:
    """The docstrings of a public name and of its public methods."""
    if not isinstance(value, type) and not inspect.isfunction(value):
        return
    yield from docstring_texts(name, inspect.getdoc(value) or "")
    for method, member in vars(value).items() if isinstance(value, type) else ():
        if not method.startswith("_") and isinstance(member, (FunctionType, classmethod, staticmethod, property)):
            yield from docstring_texts(f"{name}.{method}", getattr(member, "__doc__", None) or "")


def docstring_texts(place: str, docstring: str) -> Iterator[Text]:
    """Paragraphs, items and the entries of sections; no code."""
    paragraph: list[str] = []
    for line in [*inspect.cleandoc(docstring).splitlines(), ""]:
        code = line.strip().startswith((">>>", "..."))
        begins = re.match(r"\s*- |\s+[\w*]+(?:, [\w*]+)*: |\w+(?: \([^)]*\))?:$", line)
        if paragraph and (code or begins or not line.strip()):
            yield Text(place, " ".join(paragraph))
            paragraph = []
        if line.strip() and not code:
            paragraph.append(line.strip())


def messages(file: str, source: str) -> Iterator[Text]:
    """What errors and warnings say: the texts that a `raise` or a `warn` holds."""
    for node in ast.walk(ast.parse(source)):
        warns = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "warn",
            "warning",
        )
        if isinstance(node, ast.Raise) or warns:
            pieces = [part for part in ast.walk(node) if isinstance(part, (ast.Constant, ast.JoinedStr))]
            inner = {
                id(value)
                for piece in pieces
                if isinstance(piece, ast.JoinedStr)
                for value in ast.walk(piece)
                if value is not piece
            }
            for piece in pieces:
                if id(piece) not in inner and (text := _written(piece)):
                    yield Text(f"{file}:{piece.lineno}", text)


def _written(piece: ast.Constant | ast.JoinedStr) -> str:
    """A message as it stands in the source; what is filled in is one word."""
    if isinstance(piece, ast.Constant):
        return piece.value if isinstance(piece.value, str) else ""
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in piece.values)


if __name__ == "__main__":
    found = [fault for text in texts() for fault in faults(text)]
    print("\n".join(map(str, found)))
    sys.exit(f"{len(found)} faults" if found else None)
