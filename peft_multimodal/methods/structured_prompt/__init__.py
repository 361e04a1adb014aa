"""StructuredPrompt: a text prompt of general, instance and domain parts; the instance part looks at the image.

A frozen dual encoder with vision tower f_v and text tower f_t classifies an image x among classes c by

    Z(x)    patch states of f_v, S x d_v;  v(x) the image's embedding, of norm 1
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

Cost: "GDI" computes [SOS] G D_c once a class list and I(x) [EOS] for each image and class; "GID" computes [SOS] G I(x)
once an image. Both are exact, in training too.

`context.py` holds what trains; `pieces.py`, `reader.py` and `pipeline.py` lead from token ids to cosines; `classifier.py`
stands in for the model's `forward`, and `keeper.py` keeps results from call to call.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.companions import CardNotes
from ...core.config import MultimodalConfig, check_heads, takes_no_targets
from ...core.matrices import Site
from ...core.modules import is_below, unwrap
from ...core.readers import token_embeddings
from ...core.registry import Promises, Use, method
from ...core.tuner import Injection, MultimodalTuner
from .classifier import PromptedClassifier, StructuredPromptLayer
from .context import StructuredContext, VisualAttention
from .dual_encoder import base_alone, scaled, text_tower, widths

CHUNK = 64  # texts at a time where no config says


@takes_no_targets("text", "the text tower reads the prompt as a whole")
@dataclass
class StructuredPromptConfig(MultimodalConfig):
    """Configuration of [`StructuredPromptModel`].

    Args:
        num_general: M_g, tokens of the general context.
        num_instance: M_i, tokens of the instance context; 0 leaves the image out.
        num_domain: M_d, tokens of a domain context.
        order: "GDI" or "GID". "GDI" is cheaper for a class list that stays, "GID" for few images at a time.
        domain: "one" context for all classes, or "per_class": it then serves that number of classes alone.
        num_domains: n_dom: 1, or how many classes there are.
        general_init: Words that the general context starts from, at its end where they are fewer tokens than it has;
            None draws from N(0, 0.02^2). They are read by the tokenizer of `set_classes`. Of the default words the last
            that fit are taken; other words have to fit.
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
        domain_init: Of files of earlier versions, which load as they were trained.
        instance_init: Of files of earlier versions, which load as they were trained.

    The other arguments are those of [`MultimodalConfig`].

    Raises:
        ValueError: a field has a wrong value.

    Examples:
        >>> StructuredPromptConfig(num_general=4, num_instance=4, num_domain=2, order="GDI")
    """

    num_general: int = 4
    num_instance: int = 4
    num_domain: int = 2
    order: str = "GDI"
    domain: str = "one"
    num_domains: int = 1
    general_init: str | None = "a photo of a"
    attention_dim: int = 128
    num_heads: int | None = None
    mode: str = "prompt"
    chunk_size: int = 32
    shortlist: int | None = None
    text_anchor: float = 0.0
    anchor_template: str = "a photo of a {}"
    output_dim: int | None = None
    # Of earlier versions: read from their files, and never written.
    domain_init: InitVar[str | None] = None
    instance_init: InitVar[str | None] = None

    def __post_init__(self, domain_init: str | None, instance_init: str | None) -> None:
        super().__post_init__()
        self._refuse_what_went(domain_init=domain_init, instance_init=instance_init)
        for name in ("num_general", "num_instance", "num_domain"):
            self.check_number(name, 0, integer=True)
        for name in ("num_domains", "attention_dim", "chunk_size"):
            self.check_number(name, 1, integer=True)
        check_heads(self, "attention_dim")
        self.check_choice("order", ("GDI", "GID"))
        self.check_choice("mode", ("prompt", "feature"))
        self.check_choice("domain", ("one", "per_class"))
        self.check("num_domains", "1 where domain='one'", lambda v: v == 1 or self.domain != "one")
        others = self.num_domain + self.num_instance
        self.check("num_general", "above 0 where the other contexts are empty", lambda v: v + others > 0)
        self.check("general_init", "words or None", lambda v: v is None or (isinstance(v, str) and v.strip()))
        self.check_sizes("shortlist", "output_dim")
        self.check("shortlist", "None where no prompt looks at the image", lambda v: v is None or self.looks())
        self.check_number("text_anchor", 0, 1e6)
        self.check("anchor_template", "words with {} for the name", lambda v: isinstance(v, str) and "{}" in v)

    def _refuse_what_went(self, **words: str | None) -> None:
        """Options that earlier versions had: a start alone doesn't matter any more once an adapter is trained."""
        for name, value in words.items():
            if value is not None and not self.is_loaded:
                raise ValueError(
                    f"{type(self).__name__}.{name} must be None, got {value!r}: the option is gone, and only the general context "
                    "starts from words (general_init)."
                )
            if value is not None:
                warnings.warn(
                    f"The file of this adapter has {name}={value!r}, words that a context started from in an earlier version. "
                    "It is loaded as it was trained; a new one starts without.",
                    stacklevel=4,
                )
        if self.domain == "per_group":
            raise ValueError(
                f"{type(self).__name__}.domain must be 'one' or 'per_class', got 'per_group', which is gone: train a new adapter, or keep "
                "peft_multimodal 0.1 for an adapter that has it."
            )

    def looks(self) -> bool:
        """Whether the prompt depends on the image."""
        return self.mode == "prompt" and self.num_instance > 0

    def context(self) -> int:
        """Tokens that a prompt has beside the name's and the tokenizer's."""
        return self.num_general + self.num_domain + (self.num_instance if self.looks() else 0)


# --- the model -------------------------------------------------------------------------------------------------------


@method(
    "structured_prompt",
    StructuredPromptConfig,
    summary="A classifier from few labels: prompts that look at the image.",
    use=Use(
        have="a few labelled images of each class",
        want="a classifier whose class names may change",
        cost="the text tower runs for each class and image; with `num_instance=0` once for each class",
        compare="zero-shot, and a linear probe that starts from the class texts. The probe wins where names never change",
    ),
    docs="docs/structured-prompt.md",
    promises=Promises(starts_as="images", acts_on="tower", classes=True),
)
class StructuredPromptModel(MultimodalTuner):
    """Turns a dual encoder into a classifier whose prompts look at the image; the towers stay frozen.

    A call takes pixel_values (B, 3, H, W), and labels (B) for the loss, and gives logits (B, C) over the class list. With
    input_ids (N, L) and attention_mask the captions of the call take the list's place: logits_per_image (B, N), and the
    base class's loss of pairs with return_loss=True. A row's logits depend on no other row, a class's on no other class.

    Source: the form is that of DAMO's talk on prompts that activate instance information. The general context alone
        is CoOp
    (Zhou et al. 2022, "Learning to Prompt for Vision-Language Models", arXiv 2109.01134).

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoTokenizer, Trainer, TrainingArguments
        >>> model = get_peft_model(clip, StructuredPromptConfig(num_general=4, num_instance=4, num_domain=2))
        >>> tokenizer = AutoTokenizer.from_pretrained("openai/clip-vit-base-patch32")
        >>> model.set_classes(["red apple", "green apple"], tokenizer)  # also after loading
        >>> args = TrainingArguments("out", learning_rate=1e-3, label_names=["labels"])
        >>> Trainer(model, args, train_dataset=few_shot).train()  # columns: pixel_values, labels
        >>> model(pixel_values=x).logits
    """

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
    def sites(cls, config: StructuredPromptConfig, model: nn.Module, anatomy: Anatomy) -> list[Site]:
        path = text_tower(model, anatomy)
        width: Any = unwrap(model.get_submodule(token_embedding(model, path))).embedding_dim
        return [Site(path, "prompt", "text", "text.prompt.0", width, config.context())]

    def check(self, config: StructuredPromptConfig, sites: Sequence[Site], anatomy: Anatomy) -> None:
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

    def prepare(self, config: StructuredPromptConfig, sites: Sequence[Site], anatomy: Anatomy) -> tuple[int, int, int]:
        """Widths of the text tower, the patches and the shared space."""
        measured = widths(self.model, sites[0].module, anatomy)
        dim = measured[-1]
        if config.is_loaded and config.output_dim not in (None, dim):
            raise ValueError(
                f"This adapter belongs to another base: there images and texts met in {config.output_dim} dimensions, "
                f"in {anatomy.model_class} in {dim}."
            )
        config.output_dim = dim
        return measured

    def make(self, injection: Injection, site: Site, module: nn.Module) -> PromptedClassifier:
        embedding: Any = self.model.get_submodule(token_embedding(self.model, site.module))
        return PromptedClassifier(self.model, module, embedding)

    def add(self, injection: Injection, site: Site, part: PromptedClassifier) -> None:
        config: StructuredPromptConfig = injection.config
        text_width, patch_width, embed_width = injection.prepared
        of_features = config.mode == "feature"
        width, heads = embed_width if of_features else text_width, cast(int, config.num_heads)
        context = StructuredContext(
            text_width,
            num_general=config.num_general,
            num_instance=0 if of_features else config.num_instance,
            num_domain=config.num_domain,
            num_domains=config.num_domains,
        )
        if config.looks() or of_features:
            context.attention = VisualAttention(width, patch_width, config.attention_dim, heads)
        part.add(injection.adapter_name, config, context)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for part in (m for m in model.modules() if isinstance(m, PromptedClassifier)):
            part.unread.discard(adapter_name)  # trained contexts: no words in their place
        return found

    @classmethod
    def card_notes(cls, model: nn.Module, adapter_name: str) -> CardNotes:
        part = next(m for m in model.modules() if isinstance(m, PromptedClassifier))
        return CardNotes() if part.texts is None else CardNotes(classes=part.texts.names or ())

    def classifier(self) -> PromptedClassifier | None:
        """The part that holds the prompts and the class list."""
        return next((m for m in self.model.modules() if isinstance(m, PromptedClassifier)), None)

    def set_classes(self, names: Sequence[str], tokenizer: Any) -> None:
        """Say what there is to tell apart. At any time; the list is no part of the adapter and is never saved.

        Args:
            names: Class names, or captions to retrieve among.
            tokenizer: The base model's.

        Raises:
            ValueError: names are missing, are there twice, or are too long for the text tower beside the prompt. Or
                `domain="per_class"` was trained for another number of classes, or the general context has fewer
                tokens than the words that it starts from.
        """
        part: Any = self.classifier()
        part.set_tokenizer(tokenizer)
        part.set_classes(names)

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Instead of `set_classes`, where captions come with each batch: what frames its texts is learned from it.

        Args:
            tokenizer: The base model's.
        """
        part: Any = self.classifier()
        part.set_tokenizer(tokenizer)

    @torch.no_grad()
    def zero_shot_logits(self, pixel_values: Tensor, template: str = "a photo of a {}", **image_inputs: Any) -> Tensor:
        """(B, C): the base model's own logits for the class list in a template.

        Args:
            pixel_values: (B, 3, H, W).
            template: With {} for the name.
            image_inputs: What else the vision tower reads, such as `pixel_attention_mask`.
        """
        part: Any = self.classifier()
        with base_alone(self.model):
            v = part.look(pixel_values, **image_inputs).v
        return scaled(self.model, v @ part.templated(template, CHUNK).to(v.dtype).T)

    @torch.no_grad()
    def instance_attention(self, pixel_values: Tensor, **image_inputs: Any) -> Tensor:
        """(B, heads, n, S): how the n instance tokens (or classes, with `mode="feature"`) look at the patches.

        Args:
            pixel_values: (B, 3, H, W).
            image_inputs: What else the vision tower reads, such as `pixel_attention_mask`.

        Raises:
            ValueError: the active adapter has no instance part.
        """
        part: Any = self.classifier()
        (adapter_name,) = part.live_adapters()
        context = part.structured_prompt_context[adapter_name]
        if context.attention is None:
            raise ValueError(f"Adapter {adapter_name!r} has num_instance=0: it doesn't look at images.")
        images, X = part.look(pixel_values, **image_inputs), context.instance
        if X is None:  # mode="feature"
            X = part.static(adapter_name)
        return context.attention.weights(X, images.Z, images.mask)

    @torch.no_grad()
    def shortlist_recall(
        self, pixel_values: Tensor, ks: Sequence[int] = (1, 5, 10), **image_inputs: Any
    ) -> dict[int, float]:
        """{k: share of images, in percent, whose winner among all classes is among the k that static prompts rank
        first}.

        Args:
            pixel_values: (B, 3, H, W).
            ks: Lengths of shortlists.
            image_inputs: What else the vision tower reads, such as `pixel_attention_mask`.
        """
        part: Any = self.classifier()
        (adapter_name,) = part.live_adapters()
        texts, images = part.listed(adapter_name), part.look(pixel_values, **image_inputs)
        cos, _ = part.prompts(adapter_name).cosines(images, texts, part.known(adapter_name))
        winner, static = cos.argmax(dim=1, keepdim=True), part.static(adapter_name).to(images.v.dtype)
        order = (images.v @ static.T).argsort(dim=1, descending=True)
        place = (order == winner).int().argmax(dim=1)
        return {k: 100 * (place < k).double().mean().item() for k in ks}


def token_embedding(model: nn.Module, tower: str) -> str:
    """Path of the embedding that a text tower reads tokens by."""
    return next(path for path in token_embeddings(model) if is_below(path, tower))
