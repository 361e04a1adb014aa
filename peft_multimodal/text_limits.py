"""What a model can read: how many tokens, and whether it reads the padding behind a text."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core.anatomy import base_model, device_of, own_modules, token_embeddings
from .core.modes import unadapted

NO_LIMIT = 1_000_000  # transformers' tokenizers say 1e30


def longest_text(model: nn.Module) -> int | None:
    """How many tokens a model, or a text tower, reads; None where nothing says.

    It is the size of the table of positions that stands beside the table of tokens, less the rows that it doesn't count
    from (RoBERTa's padding, OPT's offset); the smallest where there are several. Without a table (rotary positions) it is
    the config's `max_position_embeddings`.
    """
    model = base_model(model)
    modules = own_modules(model)
    beside = {path.rpartition(".")[0] for path in token_embeddings(model)}
    tables: list[Any] = [
        module
        for path, module in modules.items()
        for parent, _, leaf in [path.rpartition(".")]
        if isinstance(module, nn.Embedding) and parent in beside and re.search(r"position|wpe", leaf)
    ]
    if tables:
        return min(table.num_embeddings - _not_counted(table) for table in tables)
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _not_counted(table: Any) -> int:
    if isinstance(offset := getattr(table, "offset", None), int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def limit_of(tokenizer: Any, *others: int | None) -> int | None:
    """The smallest of a tokenizer's own limit and others, None where there is none."""
    limit = getattr(tokenizer, "model_max_length", None)
    return min((n for n in (limit, *others) if n is not None and n < NO_LIMIT), default=None)


def allowed_length(asked: int | None, tokenizer: Any, model: nn.Module | None) -> int | None:
    """The longest text in tokens: what was asked for, else the smaller of the tokenizer's and the model's limit.

    Raises:
        ValueError: more was asked for than the model reads.
    """
    reads = None if model is None else longest_text(model)
    if asked is None:
        return limit_of(tokenizer, reads)
    if reads is not None and asked > reads:
        raise ValueError(f"A length of {asked} tokens was asked for, but the model reads {reads}.")
    return asked


def truncation(length: int | None) -> dict[str, Any]:
    """A tokenizer's arguments for texts of at most this length; None cuts nothing."""
    return {"truncation": length is not None, "max_length": length}


@torch.no_grad()
def reads_padding(model: Any, tokenizer: Any = None) -> bool:
    """Whether a text has other features when padding stands behind it, as in SigLIP, which pools the last position.

    Such a model was trained on texts of one length. It is found out by trying, without adapters. A model that gives no
    features of a text alone, or whose weights are yet to be loaded, is taken for one that doesn't.

    Args:
        model: A model or its text tower.
        tokenizer: The model's; without one the text is a few of its first tokens.
    """
    base, extra = base_model(model), 3
    if device_of(base).type == "meta" or not token_embeddings(base):
        return False
    if tokenizer is None:
        short = _any_text(base)
        padded = {
            "input_ids": F.pad(short["input_ids"], (0, extra)),
            "attention_mask": F.pad(short["attention_mask"], (0, extra)),
        }
    elif getattr(tokenizer, "pad_token", None) is None:
        return False
    else:
        short = tokenizer("a", return_tensors="pt")
        length = short["input_ids"].shape[1] + extra
        padded = tokenizer("a", padding="max_length", padding_side="right", max_length=length, return_tensors="pt")
    limit = limit_of(tokenizer, longest_text(base))
    if limit is not None and padded["input_ids"].shape[1] > limit:
        return False
    with unadapted(model):
        one, other = _features(base, short), _features(base, padded)
    if one is None or other is None or one.ndim != 2:  # FLAVA gives every token's
        return False
    return bool((one - other).norm() > torch.finfo(one.dtype).eps ** 0.5 * one.norm())


def _any_text(base: Any) -> dict[str, Tensor]:
    """Ends with the last token that there is: CLIP pools its greatest id."""
    modules: dict[str, Any] = own_modules(base)
    size = min(modules[path].num_embeddings for path in token_embeddings(base))
    ids = torch.tensor([[2, 3, size - 1]]) % size
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _features(base: Any, tokens: Any) -> Tensor | None:
    """(1, d) of one text; None where the model gives none."""
    name = "get_text_features" if hasattr(base, "get_text_features") else "forward"
    named = inspect.signature(getattr(type(base), name)).parameters
    if "pixel_values" in named or "input_ids" not in named:
        return None
    output = getattr(base, name)(**{k: v.to(device_of(base)) for k, v in tokens.items() if k in named})
    if isinstance(output, Tensor):
        return output
    return next((output[key] for key in ("text_embeds", "pooler_output") if key in output), None)
