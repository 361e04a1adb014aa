"""StructuredPrompt: a text prompt of general, instance and domain parts; the instance part looks at the picture.

A frozen dual encoder with vision tower f_v and text tower f_t classifies a picture x among classes c by

    Z(x)    patch states of f_v, S x d_v;  v(x) the picture's embedding, of norm 1
    G       general context, M_g x d_t, starting from words such as "a photo of a"
    I(x)  = Q + g MHA(LN(Q) W_q, LN(Z) W_k, LN(Z) W_v) W_o          instance context, M_i x d_t; g = 0 at the start
    D_c   = [K_dom(c); E(name_c)]                                   domain context, M_d x d_t, and the name's embeddings
    T_c(x) = [SOS] G D_c I(x) [EOS]   (order "GDI")   or   [SOS] G I(x) D_c [EOS]   (order "GID")
    w_c(x) = norm(f_t(T_c(x))),    logit_c = exp(s) v(x) . w_c(x) + b,    L = CE(logits, y)

The form is that of DAMO's talk on prompts that activate instance information; G alone is CoOp (Zhou et al. 2022,
arXiv 2109.01134). The towers stay frozen. `mode="feature"` attends on the features of static prompts instead,
w_c(x) = norm(w_c + g MHA(LN(w_c), LN(Z))): another model, for C texts a class list and not B C.

Parameters: (M_g + n_dom M_d + M_i) d_t + d_t (2 + 2 a) + d_v (2 + 2 a) + 1, a the attention's width. With
`mode="feature"` there is no Q, and the embedding's width e takes the place of the second d_t.

Cost: "GDI" computes [SOS] G D_c once a class list and I(x) [EOS] for each picture and class; "GID" computes
[SOS] G I(x) once a picture. Both are exact, in training too; how stands in `prompt_text.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import PeftType
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ..anatomy import Anatomy, Matrix, base_model, describe, is_below, pixel_readers, token_embeddings
from ..registry import register
from ..tuner import AttachedPart, MultimodalConfig, MultimodalLayer, MultimodalTuner, is_checkpointing
from .prompt_text import Piece, PrefixStates, PromptReader, Texts, in_eval, join

CHUNK = 64  # texts at a time where no config says
WORDS = {"general_init": "general", "domain_init": "domain", "instance_init": "instance"}  # field: parameter


@dataclass
class StructuredPromptConfig(MultimodalConfig):
    """Configuration of [`StructuredPromptModel`].

    Args:
        num_general: M_g, tokens of the general context.
        num_instance: M_i, tokens of the instance context; 0 leaves the picture out.
        num_domain: M_d, tokens of a domain context.
        order: "GDI" or "GID". "GDI" is cheaper for a class list that stays, "GID" for few pictures at a time.
        domain: "one" context for all classes, "per_class" (it then serves that number of classes alone), or
            "per_group", the groups being named in `set_classes`.
        num_domains: n_dom, how many classes or groups there are.
        general_init, domain_init, instance_init: Words that a context starts from, at its end where they are fewer
            tokens than it has; None draws from N(0, 0.02^2). They are read by the tokenizer of `set_classes`.
        attention_dim: Width a of the attention over the patches.
        num_heads: Its heads.
        mode: "prompt", or "feature" for attention on the class features.
        chunk_size: How many classes are computed at a time. Sets the memory of a step, whatever the class count.
        shortlist: In eval mode, give instance prompts to the k classes alone that static prompts (I = Q) rank first;
            the others take their static logit, held at or below the k. `shortlist_recall` says what it costs.
        text_anchor: Weight of the mean of 1 - w_c(x) . w_c in the loss, w_c being the base model's feature of
            `anchor_template` (of the caption itself where captions are given).
        anchor_template: With {} for the name.
        output_dim: e of the base model; filled in, checked on loading.
    """

    num_general: int = 4
    num_instance: int = 4
    num_domain: int = 2
    order: str = "GDI"
    domain: str = "one"
    num_domains: int = 1
    general_init: str | None = "a photo of a"
    domain_init: str | None = None
    instance_init: str | None = None
    attention_dim: int = 128
    num_heads: int = 4
    mode: str = "prompt"
    chunk_size: int = 32
    shortlist: int | None = None
    text_anchor: float = 0.0
    anchor_template: str = "a photo of a {}"
    output_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("STRUCTURED_PROMPT")
        for name in ("num_general", "num_instance", "num_domain"):
            self.check_number(name, 0, integer=True)
        for name in ("num_domains", "attention_dim", "num_heads", "chunk_size"):
            self.check_number(name, 1, integer=True)
        self.check("num_heads", "a divisor of attention_dim", lambda v: self.attention_dim % v == 0)
        self.check_choice("order", ("GDI", "GID"))
        self.check_choice("mode", ("prompt", "feature"))
        self.check_choice("domain", ("one", "per_class", "per_group"))
        self.check("num_domains", "1 where domain='one'", lambda v: v == 1 or self.domain != "one")
        others = self.num_domain + self.num_instance
        self.check("num_general", "above 0 where the other contexts are empty", lambda v: v + others > 0)
        for name in WORDS:
            self.check(name, "words or None", lambda v: v is None or (isinstance(v, str) and v.strip()))
        self.check("shortlist", "a positive integer or None", lambda v: v is None or (type(v) is int and v > 0))
        self.check("shortlist", "None where no prompt looks at the picture", lambda v: v is None or self.looks())
        self.check_number("text_anchor", 0, 1e6)
        self.check("anchor_template", "words with {} for the name", lambda v: isinstance(v, str) and "{}" in v)
        self.check("output_dim", "a positive integer or None", lambda v: v is None or (type(v) is int and v > 0))
        whole = "None: the text tower reads the prompt as a whole"
        for name in ("target_modules", "exclude_modules", "layers_to_transform"):
            self.check(name, whole, lambda v: v is None)
        self.check("towers", "None or ['text']", lambda v: v is None or list(v) == ["text"])

    def looks(self) -> bool:
        """Whether the prompt depends on the picture."""
        return self.mode == "prompt" and self.num_instance > 0

    def context(self) -> int:
        """Tokens that a prompt has beside the name's and the tokenizer's."""
        return self.num_general + self.num_domain + (self.num_instance if self.looks() else 0)


@dataclass
class StructuredPromptOutput(ModelOutput):
    """What the model gives while an adapter is active.

    Args:
        loss: Where `labels` or `return_loss=True` were given.
        logits: (B, C) over the class list.
        logits_per_image: (B, N) over the captions of the call, where `input_ids` were given.
        logits_per_text: Its transpose.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None


# --- the prompt ------------------------------------------------------------------------------------------------------


class VisualAttention(nn.Module):
    """X + g MHA(LN(X) W_q, LN(Z) W_k, LN(Z) W_v) W_o, with g = 0 at the start.

    Args:
        width: Of X.
        patch_width: d_v, of Z.
        attention_dim: a.
        heads: They divide a.
    """

    def __init__(self, width: int, patch_width: int, attention_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_patches = nn.LayerNorm(width), nn.LayerNorm(patch_width)
        # No biases: that of the keys would change nothing.
        self.query = nn.Linear(width, attention_dim, bias=False)
        self.key = nn.Linear(patch_width, attention_dim, bias=False)
        self.value = nn.Linear(patch_width, attention_dim, bias=False)
        self.out = nn.Linear(attention_dim, width, bias=False)
        self.gate_norm = nn.Parameter(torch.zeros(()))  # g; Trainer gives names in `_norm` no weight decay

    def weights(self, X: Tensor, Z: Tensor) -> Tensor:
        """(B, heads, n, S): how each row of X (n, width) looks at the patches Z (B, S, d_v)."""
        return self._weights(X, self.norm_patches(Z))

    def _weights(self, X: Tensor, Z: Tensor) -> Tensor:
        q = self.query(self.norm_query(X)).unflatten(-1, (self.heads, -1))
        k = self.key(Z).unflatten(-1, (self.heads, -1))
        return (torch.einsum("nhd,bshd->bhns", q, k) / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def forward(self, X: Tensor, Z: Tensor) -> Tensor:
        """X (n, width) and Z (B, S, d_v) -> (B, n, width)."""
        Z = self.norm_patches(Z.to(self.gate_norm.dtype))
        X = X.to(self.gate_norm.dtype)
        v = self.value(Z).unflatten(-1, (self.heads, -1))
        seen = torch.einsum("bhns,bshd->bnhd", self._weights(X, Z).to(v.dtype), v)
        return X + self.gate_norm * self.out(seen.flatten(2))


class StructuredContext(nn.Module):
    """The trained part of an adapter: G, K, Q and the attention.

    Args:
        config: The adapter's.
        text_width: d_t of the tower's embeddings.
        patch_width: d_v.
        embed_width: e of the shared space.
    """

    def __init__(self, config: StructuredPromptConfig, text_width: int, patch_width: int, embed_width: int) -> None:
        super().__init__()

        def drawn(*shape: int) -> nn.Parameter | None:
            return nn.Parameter(0.02 * torch.randn(*shape, text_width)) if 0 not in shape else None

        self.general = drawn(config.num_general)  # G
        self.domain = drawn(config.num_domains, config.num_domain)  # K
        self.instance = drawn(config.num_instance) if config.mode == "prompt" else None  # Q
        width = text_width if config.mode == "prompt" else embed_width
        sizes = (width, patch_width, config.attention_dim, config.num_heads)
        self.attention = VisualAttention(*sizes) if config.looks() or config.mode == "feature" else None


class StructuredPromptLayer(MultimodalLayer):
    """Base of what this method puts into a model."""


class PromptedClassifier(AttachedPart, StructuredPromptLayer, nn.Module):
    """Hangs below the text tower and takes the model's `forward` over: pictures in, class logits out.

    With the adapters disabled the model is as it was. The class list belongs to the model, not to an adapter, and is
    never saved.
    """

    role = "text"
    adapter_layer_names = ("structured_prompt_context",)
    structured_prompt_context: Any  # {adapter: StructuredContext}

    def __init__(self, model: Any, tower: nn.Module, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)
        AttachedPart.__init__(self)
        self.structured_prompt_context = nn.ModuleDict()
        self.configs: dict[str, StructuredPromptConfig] = {}
        self.unread: dict[str, list[str]] = {}  # {adapter: fields of WORDS that wait for a tokenizer}
        self.reader = PromptReader(model, tower, embedding)
        self.hooks = [embedding.register_forward_hook(self.reader.replace)]
        self.tokenizer: Any = None
        self.texts: Texts | None = None
        self.kept: dict[tuple[str, str], tuple[list[Any], Any]] = {}
        self._model, self._tower = (model,), (tower,)  # tuples are not registered
        self._own = {
            name: model.__dict__[name] for name in ("forward", "accepts_loss_kwargs") if name in model.__dict__
        }
        # Trainer would pass on the count of labels to a forward with **kwargs; the loss is a mean over its own batch.
        model.__dict__.update(forward=self.forward, accepts_loss_kwargs=False)

    def host(self) -> nn.Module:
        return self._tower[0]

    def remove_hooks(self) -> None:
        super().remove_hooks()
        self.reader.restore_attention()
        model = self._model[0]
        for name in ("forward", "accepts_loss_kwargs"):
            del model.__dict__[name]
        model.__dict__.update(self._own)

    def add(self, adapter_name: str, config: StructuredPromptConfig, sizes: tuple[int, int, int]) -> None:
        self.configs[adapter_name] = config
        self.structured_prompt_context[adapter_name] = StructuredContext(config, *sizes)
        self.settle(adapter_name)
        if not config.is_loaded:
            self.unread[adapter_name] = [name for name in WORDS if getattr(config, name) is not None]
            self.read_words()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self.unread.pop(adapter_name, None)
        self.kept = {key: value for key, value in self.kept.items() if key[0] != adapter_name}

    # --- classes ---

    def set_tokenizer(self, tokenizer: Any) -> None:
        self.reader.measure(tokenizer)
        self.tokenizer = tokenizer
        self.read_words()

    @torch.no_grad()
    def read_words(self) -> None:
        """Let the contexts of new adapters start from their words, once there is a tokenizer to read them."""
        for adapter_name, fields in list(self.unread.items()) if self.tokenizer is not None else ():
            config = self.configs[adapter_name]
            for field in fields:
                context = getattr(self.structured_prompt_context[adapter_name], WORDS[field])
                if context is None or context.is_meta:
                    continue
                ids = self.reader.tokenizer_frame().words(self.tokenizer, [getattr(config, field)])[0]
                if len(ids) > context.shape[-2]:
                    raise ValueError(
                        f"{field}={getattr(config, field)!r} is {len(ids)} tokens, but num_{WORDS[field]} is "
                        f"{context.shape[-2]}: use fewer words, more tokens, or None."
                    )
                start = self.reader.tokens(ids).embeds[0]
                context[..., context.shape[-2] - len(ids) :, :] = start.to(context)
            del self.unread[adapter_name]

    def set_classes(self, names: Sequence[str], groups: Sequence[int] | None) -> None:
        """The checks of [`StructuredPromptModel.set_classes`], then the list."""
        frame, device = self.reader.tokenizer_frame(), self.reader.embedding.weight.device
        if isinstance(names, str) or not names or not all(isinstance(n, str) and n.strip() for n in names):
            raise ValueError(f"set_classes takes a list of names, got {names!r}.")
        if groups is not None and (len(groups) != len(names) or not all(type(g) is int and g >= 0 for g in groups)):
            raise ValueError(f"groups must be a number for each of the {len(names)} names, got {groups!r}.")
        words = frame.words(self.tokenizer, names)
        seen: dict[tuple[int, ...], str] = {}
        for name, ids in zip(names, words, strict=True):
            if (other := seen.get(tuple(ids))) is not None:
                alike = "" if other == name else f": the tokenizer reads {other!r} alike"
                raise ValueError(f"Class {name!r} is there twice{alike}. Classes of one name can't be told apart.")
            seen[tuple(ids)] = name
        number = None if groups is None else torch.tensor(list(groups), device=device)
        texts = Texts.of_lists(words, frame.pad, device, groups=number, names=tuple(names))
        for adapter_name in self.active_adapters:
            if adapter_name in self.configs:
                self.fitting(texts, adapter_name)
        self.texts, self.kept = texts, {}

    def fitting(self, texts: Texts, adapter_name: str) -> Texts:
        """The texts as the adapter takes them.

        Raises:
            ValueError: it can't: too long, another number of classes, or no groups.
        """
        config, context = self.configs[adapter_name], self.configs[adapter_name].context()
        room = self.reader.room(context)
        if texts.words.shape[1] > room and not torch.compiler.is_compiling():
            for i, size in enumerate(texts.sizes()):
                if size > room:
                    raise ValueError(
                        (f"Caption {i}" if texts.names is None else f"Class {texts.names[i]!r}")
                        + f" is {size} tokens; beside {context} of the prompt the text tower, which reads "
                        f"{self.reader.longest}, has room for {max(room, 0)}. Shorten it."
                    )
        if config.domain == "per_class":
            if texts.names is None or len(texts) != config.num_domains:
                raise ValueError(
                    f"Adapter {adapter_name!r} has a domain context for each of {config.num_domains} classes "
                    f"(domain='per_class') and can't serve {len(texts)} {'captions' if texts.names is None else 'classes'}. "
                    "For lists that change train one with domain='one' or 'per_group'."
                )
            return replace(texts, groups=torch.arange(len(texts), device=texts.words.device))
        if config.domain == "per_group" and (texts.groups is None or int(texts.groups.max()) >= config.num_domains):
            raise ValueError(
                f"Adapter {adapter_name!r} has domain contexts for {config.num_domains} groups (domain='per_group'): name "
                f"each class's, set_classes(names, tokenizer, groups=[...]), by numbers below {config.num_domains}."
            )
        return texts

    # --- features of texts ---

    def features(self, adapter_name: str, texts: Texts, instance: Tensor | None, known: Any = None) -> Tensor:
        """w (B, C, e) of norm 1 for the instance contexts I(x) (B, M_i, d_t); without them B is 1.

        Args:
            known: What was computed before: the states of the prefixes, or without I(x) the features (C, e).
        """
        if instance is None:
            if known is None:
                parts = [*self._general(adapter_name), *self._domain(adapter_name, texts), self.reader.tail()]
                known = self.reader.features(join(*parts))
            return known[None]
        prefix = self.reader.prefix(self.beginning(adapter_name, texts, instance)) if known is None else known
        w = self.reader.continued(prefix, self.ending(adapter_name, texts, instance).repeat_all(len(prefix)))
        return w if self.configs[adapter_name].order == "GID" else w.transpose(0, 1)

    def beginning(self, adapter_name: str, texts: Texts, instance: Tensor) -> Piece:
        """[SOS] G D_c of each class, or for "GID" [SOS] G I(x) of each picture."""
        gid = self.configs[adapter_name].order == "GID"
        middle = [self.reader.vectors(instance)] if gid else self._domain(adapter_name, texts)
        return join(*self._general(adapter_name), *middle)

    def ending(self, adapter_name: str, texts: Texts, instance: Tensor) -> Piece:
        """I(x) [EOS] of each picture, or for "GID" D_c [EOS] of each class."""
        gid = self.configs[adapter_name].order == "GID"
        last = self._domain(adapter_name, texts) if gid else [self.reader.vectors(instance)]
        return join(*last, self.reader.tail())

    def _general(self, adapter_name: str) -> list[Piece]:
        """[SOS] G"""
        G = self.structured_prompt_context[adapter_name].general
        return [self.reader.lead()] if G is None else [self.reader.lead(), self.reader.vectors(G[None])]

    def _domain(self, adapter_name: str, texts: Texts) -> list[Piece]:
        """D_c = [K_dom(c); E(name_c)]"""
        K, names = self.structured_prompt_context[adapter_name].domain, self.reader.words(texts)
        if K is None:
            return [names]
        return [self.reader.vectors(K if self.configs[adapter_name].domain == "one" else K[texts.groups]), names]

    @torch.no_grad()
    def hand_written(self, texts: Texts, chunk_size: int) -> Tensor:
        """(C, e): the base model's features of the words as they stand."""
        pieces = (
            [self.reader.lead(), self.reader.words(part), self.reader.tail()] for part in texts.chunks(chunk_size)
        )
        return torch.cat([self.reader.features(join(*piece)) for piece in pieces])

    def templated(self, template: str, chunk_size: int) -> Tensor:
        """(C, e): the base model's features of the class list in a template, "a photo of a {}"."""
        texts, frame, room = self.listed(), self.reader.tokenizer_frame(), self.reader.room()
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"template must be words with {{}} for the name, got {template!r}.")

        def features() -> Tensor:
            filled = [template.replace("{}", name) for name in texts.names or ()]
            words = frame.words(self.tokenizer, filled)
            for text, ids in zip(filled, words, strict=True):
                if len(ids) > room:
                    raise ValueError(f"{text!r} is {len(ids)} tokens; the text tower has room for {room}. Shorten it.")
            return self.hand_written(Texts.of_lists(words, frame.pad, texts.words.device), chunk_size)

        return self.keep("", template, features)

    def listed(self) -> Texts:
        """The class list.

        Raises:
            ValueError: there is none.
        """
        if self.texts is None:
            self.reader.tokenizer_frame()
            raise ValueError(
                "No classes are set: call model.set_classes(names, tokenizer), or pass captions: input_ids."
            )
        return self.texts

    # --- what is kept of a class list from call to call ---

    def trains(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self._model[0].parameters())

    def keep(self, adapter_name: str, kind: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave since the adapter, the model and the class list last changed."""
        if self.trains() or torch.compiler.is_compiling():
            return compute()
        context = self.structured_prompt_context[adapter_name] if adapter_name else nn.Module()
        own = [p for name, p in context.named_parameters() if not name.startswith("attention.")]
        state = [(id(p), p._version) for p in self._model[0].parameters()], torch.is_autocast_enabled("cpu")
        found = self.kept.get((adapter_name, kind))
        if found is None or found[0] != state or not all(map(torch.equal, found[1], own)):
            with torch.inference_mode(False), torch.no_grad():  # so that any later call may use it
                found = state, [p.clone() for p in own], compute()
            self.kept[adapter_name, kind] = found
        return found[2]

    def known(self, adapter_name: str, texts: Texts, instance: Tensor | None) -> Any:
        """What the chunks of classes share: the pictures' prefixes ("GID"), or what is kept of the class list."""
        config = self.configs[adapter_name]
        if instance is not None and config.order == "GID":
            return self.reader.prefix(self.beginning(adapter_name, texts, instance))
        if texts.names is None or self.trains() or torch.compiler.is_compiling():
            return None
        if instance is None:
            return self.keep(adapter_name, "features", lambda: self._features(adapter_name, texts, None))
        if not self.reader.reuses_prefix():
            return None
        return self.keep(adapter_name, "prefixes", lambda: self._prefixes(adapter_name, texts, instance))

    def _features(self, adapter_name: str, texts: Texts, instance: Tensor | None) -> Tensor:
        """(C, e): the features for one instance context (1, M_i, d_t), or without any."""
        size = self.configs[adapter_name].chunk_size
        return torch.cat([self.features(adapter_name, part, instance)[0] for part in texts.chunks(size)])

    def _prefixes(self, adapter_name: str, texts: Texts, instance: Tensor) -> PrefixStates:
        size, whole = self.configs[adapter_name].chunk_size, self.beginning(adapter_name, texts, instance)
        chunks = (whole.rows(slice(start, start + size)) for start in range(0, len(whole), size))
        return PrefixStates.cat([self.reader.prefix(chunk) for chunk in chunks])

    # --- logits ---

    def instance(self, adapter_name: str, Z: Tensor) -> Tensor | None:
        """I(x) (B, M_i, d_t) of the patches Z (B, S, d_v); None where the prompt doesn't look at the picture."""
        context = self.structured_prompt_context[adapter_name]
        return context.attention(context.instance, Z) if self.configs[adapter_name].looks() else None

    def cosines(
        self, adapter_name: str, v: Tensor, Z: Tensor, texts: Texts, hand: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """v(x) . w_c(x), (B, C), and the mean of 1 - w_c(x) . hand_c where `hand` (C, e) is given.

        Args:
            v: The pictures' embeddings (B, e), of norm 1.
            Z: Their patches (B, S, d_v).
        """
        config, instance = self.configs[adapter_name], self.instance(adapter_name, Z)
        known = self.known(adapter_name, texts, instance)
        again = self.trains() and (len(texts) > config.chunk_size or is_checkpointing(self._model[0]))
        found = []
        for start in range(0, len(texts), config.chunk_size):
            rows = slice(start, start + config.chunk_size)
            by_picture = config.order == "GID" and instance is not None
            mine = (
                known if known is None or by_picture else known[rows] if isinstance(known, Tensor) else known.rows(rows)
            )
            part = (adapter_name, v, Z, texts.rows(rows), instance, mine, None if hand is None else hand[rows])
            # Recomputed in the backward pass, so that what is held for it doesn't grow with the class count.
            found.append(
                checkpoint(self._chunk, *part, use_reentrant=False, preserve_rng_state=False)
                if again
                else self._chunk(*part)
            )
        off = None if hand is None else torch.stack([o for _, o in found]).sum() / len(texts)
        return torch.cat([cos for cos, _ in found], dim=1), off

    def _chunk(
        self, adapter_name: str, v: Tensor, Z: Tensor, texts: Texts, instance: Tensor | None, known: Any, hand: Any
    ) -> tuple[Tensor, Tensor | None]:
        w = self.features(adapter_name, texts, instance, known)
        if self.configs[adapter_name].mode == "feature":
            w = F.normalize(self.structured_prompt_context[adapter_name].attention(w[0], Z), dim=-1)
        off = None if hand is None else (1 - (w * hand).sum(dim=-1)).mean(dim=0).sum()
        return (w.to(v.dtype) @ v[..., None])[..., 0], off

    def shortlisted(self, adapter_name: str, v: Tensor, Z: Tensor, texts: Texts) -> Tensor:
        """(B, C): v(x) . w_c(x) for the classes that static prompts rank first; the others' static ones, held below."""
        config, instance = self.configs[adapter_name], self.instance(adapter_name, Z)
        assert instance is not None
        cos = v @ self.static(adapter_name, texts).to(v.dtype).T
        top = cos.topk(min(config.shortlist or 0, len(texts)), dim=1).indices  # (B, k)
        known, k = self.known(adapter_name, texts, instance), top.shape[1]
        if config.order == "GID":
            w = self.reader.continued(known, self.ending(adapter_name, texts.rows(top.flatten()), instance))
        else:
            if known is None:
                known = self.reader.prefix(self.beginning(adapter_name, texts, instance))
            ending = self.ending(adapter_name, texts, instance).repeat_each(k)
            w = self.reader.continued(known.rows(top.flatten()), ending)
        best = (w.reshape(len(v), k, -1).to(v.dtype) @ v[..., None])[..., 0]
        return torch.minimum(cos, best.amin(dim=1, keepdim=True)).scatter(1, top, best)

    def static(self, adapter_name: str, texts: Texts) -> Tensor:
        """(C, e): the features with Q in place of I(x)."""
        Q = self.structured_prompt_context[adapter_name].instance[None]
        features = lambda: self._features(adapter_name, texts, Q)  # noqa: E731
        return self.keep(adapter_name, "static", features) if texts.names is not None else features()

    def look(self, pixel_values: Tensor | None, **image_inputs: Any) -> tuple[Tensor, Tensor]:
        """v (B, e), of norm 1, and the patches Z (B, S, d_v) without CLS and its like; no gradient goes through Z."""
        if pixel_values is None:
            raise ValueError("The batch has no pixel_values: the classifier needs pictures.")
        model = self._model[0]
        with in_eval(model):
            out = model.get_image_features(pixel_values=pixel_values, return_dict=True, **image_inputs)
        return F.normalize(out.pooler_output, dim=-1), patches(model, pixel_values, out.last_hidden_state.detach())

    # --- a call of the model ---

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *args: Any,
        labels: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Stands in for the model's `forward`: [`StructuredPromptModel`] says what it takes and gives."""
        active = self.live_adapters()
        if not active:
            return self._base(input_ids, pixel_values, *args, labels=labels, return_loss=return_loss, return_dict=return_dict, **kwargs)  # fmt: skip
        if len(active) > 1 or args:
            raise ValueError(
                "Inputs are passed by name."
                if args
                else f"Adapters {active} are classifiers of their own: one can be active."
            )
        adapter_name, model = active[0], self._model[0]
        config, shortlist = self.configs[adapter_name], not model.training
        text_inputs = {name: kwargs.pop(name, None) for name in ("attention_mask", "token_type_ids")}
        if input_ids is None:
            texts = self.listed()
            if return_loss:
                raise ValueError("return_loss=True is for captions (input_ids); with a class list pass labels.")
        else:
            texts = Texts.of_batch(input_ids, text_inputs["attention_mask"], self.reader.tokenizer_frame())
            if labels is not None:
                raise ValueError(
                    "labels are places in the class list; with captions (input_ids) pass return_loss=True."
                )
        texts = self.fitting(texts, adapter_name)
        if labels is not None:
            check_labels(labels, pixel_values, len(texts))
        v, Z = self.look(pixel_values, **kwargs)
        hand = None
        if config.text_anchor and (labels is not None or return_loss):
            captions = input_ids is not None
            hand = self.hand_written(texts, config.chunk_size) if captions else self.templated(config.anchor_template, config.chunk_size)  # fmt: skip
        if config.shortlist is not None and shortlist:
            cos, off = self.shortlisted(adapter_name, v, Z, texts), None
        else:
            cos, off = self.cosines(adapter_name, v, Z, texts, hand)
        logits = scaled(model, cos)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
        elif return_loss:
            loss = pair_loss(model, logits)
        if off is not None and loss is not None:
            loss = loss + config.text_anchor * off
        if input_ids is None:
            out = StructuredPromptOutput(loss=loss, logits=logits)
        else:
            out = StructuredPromptOutput(loss=loss, logits_per_image=logits, logits_per_text=logits.T)
        return out if return_dict is not False else out.to_tuple()

    def _base(self, *args: Any, labels: Tensor | None, **kwargs: Any) -> Any:
        """The model as it is."""
        if labels is not None:
            raise ValueError(
                "labels were given while no adapter is active; model.zero_shot_logits gives the base's logits."
            )
        model = self._model[0]
        given = {name: value for name, value in kwargs.items() if value is not None}
        forward = self._own.get("forward") or type(model).forward.__get__(model)
        if len(args) > 2:
            return forward(*args, **given)
        named = {
            name: value for name, value in zip(("input_ids", "pixel_values"), args, strict=True) if value is not None
        }
        return forward(**named, **given)


def check_labels(labels: Tensor, pixel_values: Tensor | None, classes: int) -> None:
    if (
        labels.ndim != 1
        or labels.is_floating_point()
        or (pixel_values is not None and len(labels) != len(pixel_values))
    ):
        raise ValueError(
            f"labels must be one class number a picture, got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if torch.compiler.is_compiling() or not len(labels):
        return
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"Label {high if high >= classes else low} is no place in the list of {classes} classes.")


# --- the dual encoder ------------------------------------------------------------------------------------------------


def scaled(model: Any, cos: Tensor) -> Tensor:
    """The model's own logits of cosines: exp(s) cos + b."""
    if not hasattr(model, "logit_scale"):
        return cos / model.temperature
    scale = model.logit_scale
    if (limit := getattr(model, "max_log_logit_scale", None)) is not None:
        scale = scale.clamp(0.0, limit)
    logits = cos * scale.exp()
    bias = getattr(model, "logit_bias", None)
    return logits if bias is None else logits + bias


def pair_loss(model: Any, logits: Tensor) -> Tensor:
    """The loss of pairs that the model was trained with: CLIP's, or SigLIP's where it has a bias."""
    if logits.shape[0] != logits.shape[1]:
        raise ValueError(f"return_loss=True needs a caption for each picture, got {tuple(logits.shape)}.")
    if getattr(model, "logit_bias", None) is not None:
        pairs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(pairs * logits).sum(dim=-1).mean()
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def patches(model: Any, pixel_values: Tensor, states: Tensor) -> Tensor:
    """The vision tower's states (B, S, d_v) or (B, d_v, H, W) without CLS, registers and their like: (B, S', d_v)."""
    if states.ndim == 4:
        return states.flatten(2).transpose(1, 2)
    readers = [model.get_submodule(path) for path in pixel_readers(model)]
    if len(readers) != 1:
        return states
    sizes = zip(pixel_values.shape[-2:], readers[0].kernel_size, readers[0].stride, strict=False)
    count = math.prod((size - kernel) // stride + 1 for size, kernel, stride in sizes)
    return states[:, max(states.shape[1] - count, 0) :]


def text_tower(model: Any, found: Anatomy) -> str:
    """Path of a dual encoder's text tower.

    Raises:
        ValueError: the model is no dual encoder.
    """
    towers = [t.path for t in found.towers if t.path and any(is_below(e, t.path) for e in token_embeddings(model))]
    dual = all(hasattr(model, f"get_{kind}_features") for kind in ("text", "image"))
    scale = any(isinstance(getattr(model, name, None), Tensor) for name in ("logit_scale", "temperature"))
    if not dual or not scale or len(towers) != 1:
        raise ValueError(
            f"{found.model_class} doesn't compare pictures with texts by features of their own, which is how classes are "
            "told apart here. Use a dual encoder (CLIP, SigLIP, ChineseCLIP, AltCLIP, VisionTextDualEncoder, ...)."
        )
    return towers[0]


@torch.no_grad()
def widths(model: Any, tower: str, found: Anatomy) -> tuple[int, int, int]:
    """(d_t, d_v, e): of the token embeddings, the patches and the shared space, measured."""
    embedding = model.get_submodule(next(p for p in token_embeddings(model) if is_below(p, tower)))
    ids = torch.ones(1, 2, dtype=torch.long, device=embedding.weight.device)
    text = type(model).get_text_features(model, input_ids=ids, attention_mask=ids, return_dict=True)
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    readers = [model.get_submodule(path) for path in pixel_readers(model)]
    if readers and isinstance(size, (int, list, tuple)):
        shape = (size, size) if isinstance(size, int) else tuple(size)
        pixels = readers[0].weight.new_zeros(1, 3, *shape)
        picture = type(model).get_image_features(model, pixel_values=pixels, return_dict=True).last_hidden_state
        patch_width = patches(model, pixels, picture).shape[-1]
    else:
        patch_width = next(t.hidden_size for t in found.towers if t.name == "vision") or 0
    return embedding.embedding_dim, patch_width, text.pooler_output.shape[-1]


# --- the model -------------------------------------------------------------------------------------------------------


class StructuredPromptModel(MultimodalTuner):
    """Turns a dual encoder into a classifier whose prompts look at the picture; the towers stay frozen.

    A call takes pixel_values (B, 3, H, W), and labels (B) for the loss, and gives logits (B, C) over the class list. With
    input_ids (N, L) and attention_mask the captions of the call take the list's place: logits_per_image (B, N), and the
    base class's loss of pairs with return_loss=True. A row's logits depend on no other row, a class's on no other class.

    Example:
        >>> model = get_peft_model(clip, StructuredPromptConfig(num_general=4, num_instance=4, num_domain=2))
        >>> model.set_classes(["red apple", "green apple"], tokenizer)  # also after loading
        >>> args = TrainingArguments("out", learning_rate=1e-3, label_names=["labels"])
        >>> Trainer(model, args, train_dataset=few_shot).train()  # columns: pixel_values, labels
        >>> model(pixel_values=x).logits
    """

    prefix = "structured_prompt_"
    tuner_layer_cls = StructuredPromptLayer
    not_mergeable = (
        "A prompt is read by the text tower beside the names; that is no weight update, so it can't be merged. Keep the "
        "adapter, or get the base model back by unload()."
    )

    @classmethod
    def match(cls, config: StructuredPromptConfig, model: nn.Module) -> list[Matrix]:
        found, model = describe(model), base_model(model)
        path = text_tower(model, found)
        tokens = next(p for p in token_embeddings(model) if is_below(p, path))
        width = model.get_submodule(tokens).embedding_dim
        return [Matrix(path, "prompt", (0, config.context()), width, config.context(), "text", "text.prompt.0")]

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str,
        parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        part = self.classifier()
        if part is None:
            tokens = next(p for p in token_embeddings(self.model) if is_below(p, current_key))
            part = PromptedClassifier(self.model, target, self.model.get_submodule(tokens))
            target.add_module("structured_prompt_classifier", part)
        part.add(adapter_name, peft_config, self._widths)
        if adapter_name not in self.active_adapters:
            part.structured_prompt_context[adapter_name].requires_grad_(False)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        found = describe(self.model)
        self._widths = widths(self.model, text_tower(self.model, found), found)  # here: low_cpu_mem_usage comes after
        dim = self._widths[-1]
        if peft_config.is_loaded and peft_config.output_dim not in (None, dim):
            raise ValueError(
                f"This adapter belongs to another base: there pictures and texts met in {peft_config.output_dim} dimensions, "
                f"in {found.model_class} in {dim}."
            )
        peft_config.output_dim = dim
        return peft_config

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for part in (m for m in model.modules() if isinstance(m, PromptedClassifier)):
            part.unread.pop(adapter_name, None)  # trained contexts: no words in their place
        return found

    def classifier(self) -> PromptedClassifier | None:
        """The part that holds the prompts and the class list."""
        return next((m for m in self.model.modules() if isinstance(m, PromptedClassifier)), None)

    def set_classes(self, names: Sequence[str], tokenizer: Any, groups: Sequence[int] | None = None) -> None:
        """Say what there is to tell apart. At any time; the list is no part of the adapter and is never saved.

        Args:
            names: Class names, or captions to retrieve among.
            tokenizer: The base model's.
            groups: For `domain="per_group"`: each class's group, numbers below `num_domains`.

        Raises:
            ValueError: names are missing, are there twice, or are too long for the text tower beside the prompt;
                groups are missing or out of range; `domain="per_class"` was trained for another number of classes; a
                context has fewer tokens than the words that it starts from.
        """
        part: Any = self.classifier()
        part.set_tokenizer(tokenizer)
        part.set_classes(names, groups)

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Instead of `set_classes`, where captions come with each batch: what frames its texts is learned from it."""
        part: Any = self.classifier()
        part.set_tokenizer(tokenizer)

    @torch.no_grad()
    def zero_shot_logits(self, pixel_values: Tensor, template: str = "a photo of a {}", **image_inputs: Any) -> Tensor:
        """(B, C): the base model's own logits for the class list in a template, which has {} for the name."""
        part: Any = self.classifier()
        v, _ = part.look(pixel_values, **image_inputs)
        return scaled(self.model, v @ part.templated(template, CHUNK).to(v.dtype).T)

    @torch.no_grad()
    def instance_attention(self, pixel_values: Tensor, **image_inputs: Any) -> Tensor:
        """(B, heads, n, S): how the n instance tokens (or classes, with `mode="feature"`) look at the patches.

        Raises:
            ValueError: the active adapter has no instance part.
        """
        part: Any = self.classifier()
        (adapter_name,) = part.live_adapters()
        context, config = part.structured_prompt_context[adapter_name], part.configs[adapter_name]
        if context.attention is None:
            raise ValueError(f"Adapter {adapter_name!r} has num_instance=0: it doesn't look at pictures.")
        _, Z = part.look(pixel_values, **image_inputs)
        texts = None if config.looks() else part.fitting(part.listed(), adapter_name)
        X = context.instance if texts is None else part._features(adapter_name, texts, None)
        return context.attention.weights(X, Z)

    @torch.no_grad()
    def shortlist_recall(
        self, pixel_values: Tensor, ks: Sequence[int] = (1, 5, 10), **image_inputs: Any
    ) -> dict[int, float]:
        """{k: share of pictures, in percent, whose winner among all classes is among the k that static prompts rank first}."""
        part: Any = self.classifier()
        (adapter_name,) = part.live_adapters()
        texts = part.fitting(part.listed(), adapter_name)
        v, Z = part.look(pixel_values, **image_inputs)
        winner = part.cosines(adapter_name, v, Z, texts)[0].argmax(dim=1, keepdim=True)
        order = (v @ part.static(adapter_name, texts).to(v.dtype).T).argsort(dim=1, descending=True)
        place = (order == winner).int().argmax(dim=1)
        return {k: 100 * (place < k).double().mean().item() for k in ks}


register("structured_prompt", StructuredPromptConfig, StructuredPromptModel)
