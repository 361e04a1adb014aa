"""English and its translations: what a model that knows English only can learn another language from.

`emoji_labels(language)` names the concepts of `emoji_images()` in one of `LANGUAGES`. `translation_pairs(language)`
has one row per pair, exact repetitions left out:

| column | content |
| --- | --- |
| `source` | English |
| `target` | the other language |
| `kind` | `label`: an emoji's name; `sentence`, `word`: Chinese only, from a graded course (HSK 1 to 6) |
| `concept` | the label's concept, `1F34E`; empty for sentences and words |
| `split` | the concept's for a label; else `train`, or `validation` for a seeded 5 % of the English texts |

The names are those of Unicode CLDR, and every language names all 1,599 concepts, each differently. They come from
emojibase-data; those of Arabic, Indonesian, Persian and Turkish from the Python package emoji, whose short codes have
lost most punctuation (`:red_apple:`). Where the scripts are alike, a name may be the English one (`taxi`).

A word comes with the first sense that the dictionary CC-CEDICT gives: most are right, a few are rare senses. No word is
the name of a concept, of any split, in either language; within a sentence such a name may occur.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets

from .fetch import Package, fetch
from .images import LABELS as ENGLISH_LABELS
from .images import bare, emoji_images

LANGUAGES = {
    "zh": "Chinese",
    "ja": "Japanese",
    "de": "German",
    "fa": "Persian",
    "ar": "Arabic",
    "bn": "Bengali",
    "da": "Danish",
    "es": "Spanish",
    "et": "Estonian",
    "fi": "Finnish",
    "fr": "French",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ko": "Korean",
    "lt": "Lithuanian",
    "ms": "Malay",
    "nb": "Norwegian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
}
SHORT_CODE_LANGUAGES = ("ar", "fa", "id", "tr")
"""Languages that emojibase-data does not have."""


class _OtherLabels(Package):
    """The archive of the English labels with other files kept of it, so in a folder of its own."""

    @property
    def key(self) -> str:
        return f"{super().key}-languages"


LABELS = _OtherLabels(
    "npm",
    ENGLISH_LABELS.name,
    ENGLISH_LABELS.version,
    ENGLISH_LABELS.sha256,
    megabytes=ENGLISH_LABELS.megabytes,
    licence=ENGLISH_LABELS.licence,
    keep=(*(f"package/{code}/compact.json" for code in LANGUAGES), "package/LICENSE"),
)
SHORT_CODES = Package(
    "pip",
    "emoji",
    "2.16.0",
    "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
    megabytes=1,
    licence="BSD",
    keep=tuple(f"emoji/unicode_codes/emoji_{code}.json" for code in SHORT_CODE_LANGUAGES),
)
HSK = Package(
    "pip",
    "hsk-sentences-audio",
    "1.0.0",
    "9bf16cc7b48a24a10af83d377439d3c6f7571a380937f4645a1cd1590d5d0335",
    megabytes=1,
    licence="MIT, data CC-BY-SA-4.0",
    keep=("hsk_sentences_audio/data/sentences.json",),
)
VALIDATION_SHARE, SPLIT_SEED = 0.05, 0

UNTRANSLATED = re.compile(r"placeholder.*|PH|.*[\u4e00-\u9fff].*")
"""What stands in the course for 84 sentences that have no English yet, or not all of it."""
PLAIN_SENSE = re.compile(r"(?!(?:used in|see|surname|classifier|abbr|(?:old )?variant of)\b)[a-z]+(?: [a-z]+){0,3}")
"""One to four lower-case words that say what something means, and not how it is used."""


class Pair(NamedTuple):
    """One row of `translation_pairs`."""

    source: str
    target: str
    kind: str
    concept: str = ""
    split: str = "train"


FEATURES = datasets.Features({name: datasets.Value("string") for name in Pair._fields})


def emoji_labels(language: str) -> dict[str, str]:
    """The name of every concept of `emoji_images()` in one of `LANGUAGES`, by concept."""
    if language not in LANGUAGES:
        raise ValueError(f"There are no labels in {language!r}; there are {', '.join(LANGUAGES)}.")
    if language in SHORT_CODE_LANGUAGES:
        text = (fetch(SHORT_CODES) / f"emoji/unicode_codes/emoji_{language}.json").read_text("utf-8")
        names = names_of_short_codes(json.loads(text))
    else:
        text = (fetch(LABELS) / f"package/{language}/compact.json").read_text("utf-8")
        names = {bare(entry["hexcode"]): " ".join(entry["label"].split()) for entry in json.loads(text)}
    concepts = dict.fromkeys(emoji_images()["concept"])
    return {code: names[bare(code)] for code in concepts if names.get(bare(code))}


def names_of_short_codes(short_codes: Mapping[str, str]) -> dict[str, str]:
    """`{"🍎": ":red_apple:"}` as `{"1F34E": "red apple"}`; of an emoji's variants, the first counts."""
    names: dict[str, str] = {}
    for emoji, short_code in short_codes.items():
        code = bare("-".join(f"{ord(character):04X}" for character in emoji))
        names.setdefault(code, " ".join(short_code.strip(":").replace("_", " ").split()))
    return names


def translation_pairs(language: str) -> datasets.Dataset:
    """Texts in English and one of `LANGUAGES`; columns as in the module's docstring."""
    images = emoji_images()
    english, split = (dict(zip(images["concept"], images[name], strict=True)) for name in ("label_en", "split"))
    labels = emoji_labels(language)
    pairs = [Pair(english[code], label, "label", code, split[code]) for code, label in labels.items()]
    if language == "zh":
        course = json.loads((fetch(HSK) / "hsk_sentences_audio/data/sentences.json").read_text("utf-8"))
        named = {text.lower() for pair in pairs for text in (pair.source, pair.target)}
        words = [pair for pair in words_of(course) if named.isdisjoint({pair.source, pair.target})]
        pairs += held_out([*sentences_of(course), *words], VALIDATION_SHARE, SPLIT_SEED)
    return datasets.Dataset.from_list([pair._asdict() for pair in dict.fromkeys(pairs)], features=FEATURES)


def sentences_of(course: Sequence[Mapping[str, Any]]) -> Iterator[Pair]:
    """The course's sentences that are translated."""
    for sentence in course:
        english = sentence["translation"]["en"]
        if not UNTRANSLATED.fullmatch(english):
            yield Pair(english, sentence["chinese"], "sentence")


def words_of(course: Sequence[Mapping[str, Any]]) -> Iterator[Pair]:
    """The course's words of two characters and more whose first sense is plain."""
    for token in (token for sentence in course for token in sentence["tokens"]):
        sense = token["gloss_en"].split(";")[0].strip()
        if len(token["word"]) > 1 and PLAIN_SENSE.fullmatch(sense):
            yield Pair(sense, token["word"], "word")


def held_out(pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """The pairs, those of a random `share` of the English texts moved to `validation`."""
    sources = sorted({pair.source for pair in pairs})
    chosen = set(random.Random(seed).sample(sources, round(share * len(sources))))
    return [pair._replace(split="validation") if pair.source in chosen else pair for pair in pairs]
