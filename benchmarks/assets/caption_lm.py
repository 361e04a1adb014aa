"""A small language model that has read captions and never seen an image.

No package ships one under a plain licence, so `caption_lm()` trains one in minutes: Llama's architecture, the words of
MiniLM's tokenizer that the benchmarks need, and for each word's first embedding the principal components of what MiniLM
makes of the word alone. So it has an idea of words that it never reads, among them the names of unseen concepts, as a
language model of any size would.

It reads pages of captions of one kind, half of them about one topic: names and keywords of the training concepts,
sentences of the training photos, easy-VQA's training questions with their answers; and the English sentences of a
graded course of Chinese. In the sentences any word may occur, such as `A penguin.` It reads nothing that is said of a validation or test
image, but for the words' places in its vocabulary. `assembly.json` holds the settings and the losses.
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .captions import Caption, captions
from .fetch import CONSOLE, build_once
from .languages import translation_pairs
from .towers import minilm

END, UNKNOWN, PAD = "<end>", "[UNK]", "[PAD]"
READ = ("names", "keywords", "sentences", "questions")
"""The kinds of captions that it reads, beside `LESSONS`."""
LESSONS = "lessons"


@dataclass(frozen=True)
class Settings:
    """The model and its training."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    ff_width: int = 768
    steps: int = 500
    batch_size: int = 32
    tokens: int = 48
    """Of a page."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    one_topic: float = 0.5
    """Share of the pages that keep to one topic."""
    seed: int = 0


def caption_lm() -> Path:
    """The language model's folder: load it with `AutoModelForCausalLM` and `AutoTokenizer`."""
    return build_once("caption-lm-2", lambda folder: _build(folder, Settings()))


def _build(folder: Path, settings: Settings) -> None:
    started = time.perf_counter()
    rng = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    tokenizer = small_tokenizer()
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.width,
            intermediate_size=settings.ff_width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.get_input_embeddings().weight.data.copy_(word_embeddings(tokenizer, settings.width))
    train(model, tokenizer, settings, rng)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    held_out = {kind: loss_of(model, tokenizer, kind, settings) for kind in READ}
    seconds = round(time.perf_counter() - started, 1)
    report = {"settings": asdict(settings), "validation_loss": held_out, "build_seconds": seconds}
    (folder / "assembly.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    CONSOLE.print(f"Caption LM trained in {seconds:.0f} s; nats a token on validation captions:", held_out)


# --- words -----------------------------------------------------------------------------------------------------------


def small_tokenizer() -> Any:
    """MiniLM's WordPiece with the pieces of the benchmarks' texts and single characters, and `END`."""
    large: Any = AutoTokenizer.from_pretrained(minilm())
    places: dict[str, int] = large.get_vocab()
    texts = [*lessons(), *(text for kind in READ for c in captions(kind) for text in (c.question, c.answer))]
    used = {piece for text in dict.fromkeys(texts) for piece in large.tokenize(text)}
    letters = {p for p in places if len(p.removeprefix("##")) == 1 and p.isascii()}
    kept = sorted((used | letters) - {UNKNOWN}, key=lambda piece: places[piece])
    vocabulary = {piece: index for index, piece in enumerate([PAD, END, UNKNOWN, *kept])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=UNKNOWN, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


@torch.inference_mode()
def word_embeddings(tokenizer: Any, width: int, batch_size: int = 256) -> Tensor:
    """The principal components `(vocabulary, width)` of MiniLM's outputs for each piece alone, at an embedding's size."""
    model, large = AutoModel.from_pretrained(minilm()).eval(), AutoTokenizer.from_pretrained(minilm())
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    outputs = []
    for start in range(0, len(pieces), batch_size):
        inner = [large.convert_tokens_to_ids(piece) for piece in pieces[start : start + batch_size]]
        ids = torch.tensor([[large.cls_token_id, i, large.sep_token_id] for i in inner])
        outputs.append(model(input_ids=ids).last_hidden_state.mean(dim=1))
    vectors = F.normalize(torch.cat(outputs), dim=-1)
    vectors = vectors - vectors.mean(dim=0)
    _, _, components = torch.linalg.svd(vectors, full_matrices=False)
    found = vectors @ components[:width].T
    return 0.04 * found / found.std()


# --- reading ---------------------------------------------------------------------------------------------------------


def lessons() -> list[str]:
    """The course's English sentences, in its order."""
    rows = translation_pairs("zh")
    return [text for text, kind in zip(rows["source"], rows["kind"], strict=True) if kind == "sentence"]


def text_of(caption: Caption, rng: random.Random) -> str:
    return f"{caption.question} {caption.said(rng)}{END}".lstrip()


class Pages:
    """Pages of one kind's captions of some splits, each begun and ended by `END`."""

    def __init__(self, kind: str, splits: Sequence[str], one_topic: float) -> None:
        self.one_topic = one_topic
        self.topics_alike = kind == "questions"  # nine of ten ask for yes or no
        self.all = [] if kind == LESSONS else [c for c in captions(kind) if c.split in splits]
        self.lessons = lessons() if kind == LESSONS else []
        topics = defaultdict(list)
        for caption in self.all:
            topics[caption.topic].append(caption)
        self.topics = dict(topics)

    def draw(self, rng: random.Random, size: int) -> str:
        if self.lessons:
            first = rng.randrange(len(self.lessons))
            return END + "".join(f"{text}{END}" for text in self.lessons[first : first + size])
        return END + "".join(text_of(caption, rng) for caption in self.choose(rng, size))

    def choose(self, rng: random.Random, size: int) -> list[Caption]:
        """Captions of different things, of any topic or of that of the first."""
        first = rng.choice(self.topics[rng.choice([*self.topics])] if self.topics_alike else self.all)
        found = self.topics[first.topic] if rng.random() < self.one_topic else self.all
        chosen = {first.thing: first}
        for _ in range(4 * size):
            if len(chosen) >= size:
                break
            other = rng.choice(found)
            chosen.setdefault(other.thing, other)
        order = list(chosen.values())
        rng.shuffle(order)
        return order


def encoded(tokenizer: Any, texts: Sequence[str], tokens: int) -> Tensor:
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    return found["input_ids"]


def train(model: Any, tokenizer: Any, settings: Settings, rng: random.Random) -> None:
    """Next-token prediction on pages of all kinds alike."""
    kinds = [Pages(kind, ("train", "text"), settings.one_topic) for kind in (*READ, LESSONS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for _ in track(range(settings.steps), "Training the language model", console=CONSOLE, transient=True):
        texts = [rng.choice(kinds).draw(rng, 16) for _ in range(settings.batch_size)]
        ids = encoded(tokenizer, texts, settings.tokens)
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def loss_of(model: Any, tokenizer: Any, kind: str, settings: Settings) -> float:
    """Nats a token on 64 validation pages."""
    rng, pages = random.Random(0), Pages(kind, ["validation"], settings.one_topic)
    ids = encoded(tokenizer, [pages.draw(rng, 16) for _ in range(64)], settings.tokens)
    return round(model(input_ids=ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)).loss.item(), 3)
