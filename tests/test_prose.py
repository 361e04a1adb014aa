"""What `make prose` finds, and that it finds nothing in what users read."""

from __future__ import annotations

import prose
import pytest
from prose import LONGEST, Text


def found(text: str) -> list[str]:
    return [fault.what for fault in prose.faults(Text("a page", text))]


def test_a_long_sentence_is_a_fault_and_two_short_ones_are_none():
    half = "word " * (LONGEST // 2)
    assert found(f"{half}{half}word.") == [f"{LONGEST + 1} words"]
    assert found(f"{half}. It goes on: {half}.") == []
    assert found(f"{half}. `code` begins a sentence: {half}.") == []


def test_code_is_one_word_and_links_are_read_without_their_address():
    assert prose.words("Call `model.get_text_features(**texts, more=1)` twice.") == 3
    assert prose.sentences("See [the page](a.md). Then go.") == ["See the page.", "Then go."]


@pytest.mark.parametrize("word", ["picture", "Pictures", "anew", "shall"])
def test_words_that_the_house_gave_up(word: str):
    assert len(found(f"The {word} is here.")) == 1
    assert found(f"The `{word}` is code.") == []


def test_blocks_of_a_page_stand_by_themselves():
    page = "# Title\n\nA paragraph\nof two lines.\n\n- one\n- two\n\n| a cell | another |\n\n```python\ncode = 1\n```\n\n    an equation\n"
    assert [text.text.strip() for text in prose.page_texts("p", page)] == [
        "A paragraph of two lines.", "- one", "- two", "a cell", "another",
    ]  # fmt: skip


def test_entries_of_a_docstring_stand_by_themselves():
    text = "It does this.\n\nArgs:\n    a: One,\n        and more.\n    b: Two.\n\nExamples:\n    >>> it(1)\n"
    assert [t.text for t in prose.docstring_texts("f", text)] == [
        "It does this.", "Args:", "a: One, and more.", "b: Two.", "Examples:",
    ]  # fmt: skip


def test_messages_are_read_with_what_is_filled_in():
    source = 'def f(x):\n    raise ValueError(f"{x!r} is " "wrong")\n\nwarnings.warn("Mind it.", stacklevel=2)\n'
    assert {t.text for t in prose.messages("f.py", source)} == {"X is wrong", "Mind it."}


def test_what_users_read_has_no_fault():
    assert not [str(fault) for text in prose.texts() for fault in prose.faults(text)]
