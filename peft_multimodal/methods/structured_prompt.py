"""StructuredPrompt: a text prompt of general, instance and domain parts; the instance part looks at the picture.

A frozen dual encoder with vision tower f_v and text tower f_t classifies a picture x among classes c by

    Z(x)    patch states of f_v, S x d_v;  v(x) the picture's embedding, of norm 1
    G       general context, M_g x d_t, starting from words such as "a photo of a"
    I(x)  = Q + g MHA(LN(Q) W_q, LN(Z) W_k, LN(Z) W_v) W_o          instance context, M_i x d_t; W_o = 0 at the start
    D_c   = [K_dom(c); E(name_c)]                                   domain context, M_d x d_t, and the name's embeddings
    T_c(x) = [SOS] G D_c I(x) [EOS]   (order "GDI")   or   [SOS] G I(x) D_c [EOS]   (order "GID")
    w_c(x) = norm(f_t(T_c(x))),    logit_c = exp(s) v(x) . w_c(x) + b,    L = CE(logits, y)

The form is that of DAMO's talk on prompts that activate instance information; G alone is CoOp (Zhou et al. 2022,
arXiv 2109.01134). The towers stay frozen. `mode="feature"` attends on the features of static prompts instead,
w_c(x) = norm(w_c + g MHA(LN(w_c), LN(Z))): another model, for C texts a class list and not B C.

Parameters: (M_g + n_dom M_d + M_i) d_t + d_t (2 + 2 a) + d_v (2 + 2 a) + 1, a the attention's width. With
`mode="feature"` there is no Q, and the embedding's width e takes the place of the second d_t.

Cost: "GDI" computes [SOS] G D_c once a class list and I(x) [EOS] for each picture and class; "GID" computes
[SOS] G I(x) once a picture. Both are exact, in training too: `prompt_classifier.py` puts prompts together, `prompt_text.py` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..core.anatomy import Anatomy, Site, is_below, token_embeddings, unwrap
from ..core.companions import CardNotes
from ..core.config import MultimodalConfig, heads_for, takes_no_targets
from ..core.registry import Promises, Use, method
from ..core.tuner import Injection, MultimodalTuner
from .prompt_classifier import (
    CHUNK,
    WORDS,
    PromptedClassifier,
    StructuredPromptLayer,
    base_alone,
    scaled,
    text_tower,
    widths,
)


@takes_no_targets("text", "the text tower reads the prompt as a whole")
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
            tokens than it has; None draws from N(0, 0.02^2). They are read by the tokenizer of `set_classes`. Of the
            default words the last that fit are taken; other words have to fit.
        attention_dim: Width a of the attention over the patches.
        num_heads: Its heads; None takes 4, or fewer where 4 doesn't divide the width.
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
    num_heads: int | None = None
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
        for name in ("num_domains", "attention_dim", "chunk_size"):
            self.check_number(name, 1, integer=True)
        if self.num_heads is None:
            self.num_heads = heads_for(self.attention_dim)
        self.check_number("num_heads", 1, integer=True)
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

    def looks(self) -> bool:
        """Whether the prompt depends on the picture."""
        return self.mode == "prompt" and self.num_instance > 0

    def context(self) -> int:
        """Tokens that a prompt has beside the name's and the tokenizer's."""
        return self.num_general + self.num_domain + (self.num_instance if self.looks() else 0)


# --- the prompt ------------------------------------------------------------------------------------------------------


class VisualAttention(nn.Module):
    """X + g MHA(LN(X) W_q, LN(Z) W_k, LN(Z) W_v) W_o, with W_o = 0 and g = 1 at the start.

    The other way round, g = 0 and W_o drawn, a few hundred few-shot steps hardly move the scalar g away from 0.

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
        nn.init.zeros_(self.out.weight)
        self.gate_norm = nn.Parameter(torch.ones(1))  # g; Trainer gives names in `_norm` no weight decay

    def weights(self, X: Tensor, Z: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, heads, n, S): how each row of X (n, width) looks at the patches Z (B, S, d_v), as far as they are real (B, S)."""
        return self._weights(X, self.norm_patches(Z), real)

    def _weights(self, X: Tensor, Z: Tensor, real: Tensor | None) -> Tensor:
        q = self.query(self.norm_query(X)).unflatten(-1, (self.heads, -1))
        k = self.key(Z).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("nhd,bshd->bhns", q, k) / math.sqrt(q.shape[-1])
        if real is not None:
            scores = scores.masked_fill(~real.bool()[:, None, None], float("-inf"))
        return scores.softmax(dim=-1)

    def forward(self, X: Tensor, Z: Tensor, real: Tensor | None = None) -> Tensor:
        """X (n, width), Z (B, S, d_v) and which of its patches are real (B, S) -> (B, n, width)."""
        Z = self.norm_patches(Z.to(self.gate_norm.dtype))
        X = X.to(self.gate_norm.dtype)
        v = self.value(Z).unflatten(-1, (self.heads, -1))
        seen = torch.einsum("bhns,bshd->bnhd", self._weights(X, Z, real).to(v.dtype), v)
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
        heads: Any = config.num_heads
        sizes = (width, patch_width, config.attention_dim, heads)
        self.attention = VisualAttention(*sizes) if config.looks() or config.mode == "feature" else None


# --- the model -------------------------------------------------------------------------------------------------------


@method(
    "structured_prompt",
    StructuredPromptConfig,
    summary="A classifier from few labels: prompts that look at the image.",
    use=Use(
        have="a few labelled images of each class",
        want="a classifier whose class names may change",
        cost="a text for each class and image; with `num_instance=0` for each class",
        compare="zero-shot, and a linear probe that starts from the text: ahead where class names never change",
    ),
    docs="docs/structured-prompt.md",
    promises=Promises(starts_as="images", acts_on="tower", classes=True),
)
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
    learning_rates = (3e-4, 1e-2)
    not_mergeable = (
        "A prompt is read by the text tower beside the names; that is no weight update, so it can't be merged. Keep the "
        "adapter, or get the base model back by unload()."
    )
    not_beside = {
        "CROSS_LINGUAL_ADAPTER": "StructuredPrompt's prompts run through the layers of the text tower, whose place "
        "CrossLingualAdapter takes: no model can have both. Give each a copy of the base model, "
        "copy.deepcopy(base) before get_peft_model."
    }

    @classmethod
    def sites(cls, config: StructuredPromptConfig, model: nn.Module, found: Anatomy) -> list[Site]:
        path = text_tower(model, found)
        width: Any = unwrap(model.get_submodule(token_embedding(model, path))).embedding_dim
        return [Site(path, "prompt", "text", "text.prompt.0", width, config.context())]

    def check(self, config: StructuredPromptConfig, sites: Sequence[Site], found: Anatomy) -> None:
        tokens = token_embedding(self.model, sites[0].module)
        parts = tokens.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        whole = [name for name in config.modules_to_save or () if any(path.endswith(name) for path in paths)]
        held = any(isinstance(self.model.get_submodule(p), (AuxiliaryTrainingWrapper, BaseTunerLayer)) for p in paths)
        if whole or held:
            raise ValueError(
                f"The text tower's token embedding ({tokens}) {f'is in modules_to_save={whole}' if whole else 'is trained by another adapter'}, and "
                "prompts, which take the place of what it gives, would be passed over. Leave it as it is."
            )

    def prepare(self, config: StructuredPromptConfig, sites: Sequence[Site], found: Anatomy) -> tuple[int, int, int]:
        """Widths of the text tower, the patches and the shared space."""
        measured = widths(self.model, sites[0].module, found)
        dim = measured[-1]
        if config.is_loaded and config.output_dim not in (None, dim):
            raise ValueError(
                f"This adapter belongs to another base: there pictures and texts met in {config.output_dim} dimensions, "
                f"in {found.model_class} in {dim}."
            )
        config.output_dim = dim
        return measured

    def make(self, injection: Injection, site: Site, module: nn.Module) -> PromptedClassifier:
        embedding: Any = self.model.get_submodule(token_embedding(self.model, site.module))
        return PromptedClassifier(self.model, module, embedding)

    def add(self, injection: Injection, site: Site, part: PromptedClassifier) -> None:
        context = StructuredContext(injection.config, *injection.prepared)
        part.add(injection.adapter_name, injection.config, context)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for part in (m for m in model.modules() if isinstance(m, PromptedClassifier)):
            part.unread.pop(adapter_name, None)  # trained contexts: no words in their place
        return found

    @classmethod
    def card_notes(cls, model: nn.Module, adapter_name: str) -> CardNotes:
        part = next(m for m in model.modules() if isinstance(m, PromptedClassifier))
        if part.texts is None or part.texts.names is None:
            return CardNotes()
        groups = part.texts.groups
        return CardNotes(classes=part.texts.names, groups=() if groups is None else groups.tolist())

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
        with base_alone(self.model):
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
        return context.attention.weights(X, Z, image_inputs.get("pixel_attention_mask"))

    @torch.no_grad()
    def shortlist_recall(
        self, pixel_values: Tensor, ks: Sequence[int] = (1, 5, 10), **image_inputs: Any
    ) -> dict[int, float]:
        """{k: share of pictures, in percent, whose winner among all classes is among the k that static prompts rank first}."""
        part: Any = self.classifier()
        (adapter_name,) = part.live_adapters()
        texts = part.fitting(part.listed(), adapter_name)
        v, Z = part.look(pixel_values, **image_inputs)
        real = image_inputs.get("pixel_attention_mask")
        winner = part.cosines(adapter_name, v, Z, texts, real=real)[0].argmax(dim=1, keepdim=True)
        order = (v @ part.static(adapter_name, texts).to(v.dtype).T).argsort(dim=1, descending=True)
        place = (order == winner).int().argmax(dim=1)
        return {k: 100 * (place < k).double().mean().item() for k in ks}


def token_embedding(model: nn.Module, tower: str) -> str:
    """Path of the embedding that a text tower reads tokens by."""
    return next(path for path in token_embeddings(model) if is_below(path, tower))
