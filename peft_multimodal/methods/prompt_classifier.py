"""The part that StructuredPrompt hangs into a dual encoder: pictures in, logits of a class list out.

Which classes there are, how their prompts are put together of pieces, what is kept of a class list from call to call,
and how many classes are computed at a time. The equations stand in `structured_prompt.py`; how the text tower reads the
pieces in `prompt_text.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from peft import NoMatchingPeftModuleError
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ..core.anatomy import Anatomy, device_of, is_below, pixel_readers, token_embeddings
from ..core.parts import AttachedPart, MultimodalLayer, is_checkpointing
from ..core.stand_in import StandIn
from .prompt_text import Piece, PrefixStates, PromptReader, Texts, in_eval, join

CHUNK = 64  # texts at a time where no config says
# {field of the config: the context that starts from its words}
BASE = ""  # in an adapter's place, of what the base model alone makes
WORDS = {"general_init": "general", "domain_init": "domain", "instance_init": "instance"}


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


class Kept(NamedTuple):
    """Something computed of a class list, and what it was computed from: it holds as long as these are the same."""

    state: Any  # of the model's parameters, which tell by their versions whether they changed
    own: list[Tensor]  # the adapter's contexts, by value
    value: Any


class PromptSettings(Protocol):
    """What is read of an adapter's settings in each call; `structured_prompt.py` says what they mean."""

    order: str
    domain: str
    num_domains: int
    mode: str
    chunk_size: int
    shortlist: int | None
    text_anchor: float
    anchor_template: str

    def looks(self) -> bool: ...

    def context(self) -> int: ...


class StructuredPromptLayer(MultimodalLayer):
    """Base of what this method puts into a model."""


class PromptedClassifier(nn.Module, AttachedPart, StructuredPromptLayer):
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
        self.configs: dict[str, PromptSettings] = {}
        self.unread: dict[str, list[str]] = {}  # {adapter: fields of WORDS that wait for a tokenizer}
        self.reader = PromptReader(model, tower, embedding)
        self.hooks = [embedding.register_forward_hook(self.reader.replace)]
        self.tokenizer: Any = None
        self.texts: Texts | None = None
        self.kept: dict[tuple[str, str], Kept] = {}
        self._model, self._tower = (model,), (tower,)  # tuples are not registered
        self._convolutions = tuple(model.get_submodule(path) for path in pixel_readers(model))
        self.image_inputs = frozenset(inspect.signature(model.get_image_features).parameters)
        self.stand_in = StandIn(model, "forward", self.forward, signature=inspect.signature(self.forward))
        # Trainer would pass on the count of labels to a forward with **kwargs; the loss is a mean over its own batch.
        self._accepted = {name: value for name, value in vars(model).items() if name == "accepts_loss_kwargs"}
        model.accepts_loss_kwargs = False

    def host(self) -> nn.Module:
        return self._tower[0]

    def remove_hooks(self) -> None:
        super().remove_hooks()
        self.reader.restore_attention()
        self.stand_in.give_back()
        del self._model[0].accepts_loss_kwargs
        vars(self._model[0]).update(self._accepted)

    def add(self, adapter_name: str, config: PromptSettings, context: nn.Module) -> None:
        self.configs[adapter_name] = config
        self.structured_prompt_context[adapter_name] = context
        self.settle(adapter_name)
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
                if getattr(config, field) == getattr(type(config), field):
                    ids = ids[-context.shape[-2] :]  # nobody chose these words for this length
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
        frame, device = self.reader.tokenizer_frame(), device_of(self.reader.embedding)
        names, groups = in_order(names), None if groups is None else in_order(groups)
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
            raise ValueError(f"set_classes takes a list of names, got {names!r}.")
        if groups is not None and (
            not isinstance(groups, list)
            or len(groups) != len(names)
            or not all(type(g) is int and g >= 0 for g in groups)
        ):
            raise ValueError(f"groups must be a number for each of the {len(names)} names, got {groups!r}.")
        words = frame.words(self.tokenizer, names)
        seen: dict[tuple[int, ...], str] = {}
        for name, ids in zip(names, words, strict=True):
            if (other := seen.get(tuple(ids))) is not None:
                alike = "" if other == name else f": the tokenizer reads {other!r} alike"
                raise ValueError(f"Class {name!r} is there twice{alike}. Classes of one name can't be told apart.")
            seen[tuple(ids)] = name
        number = None if groups is None else torch.tensor(groups, device=device)
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
            if known is not None:
                return known[None]
            own = join(*self._domain(adapter_name, texts), self.reader.tail())
            return self.reader.continued(self.reader.prefix(self.common(adapter_name)), own)
        prefix = self.reader.prefix(*self.beginning(adapter_name, texts, instance)) if known is None else known
        w = self.reader.continued(prefix, self.ending(adapter_name, texts, instance).repeat_all(prefix.count))
        return w if self.configs[adapter_name].order == "GID" else w.transpose(0, 1)

    def beginning(self, adapter_name: str, texts: Texts, instance: Tensor) -> tuple[Piece, Piece]:
        """[SOS] G, and D_c of each class, or for "GID" I(x) of each picture."""
        gid = self.configs[adapter_name].order == "GID"
        own = [self.reader.vectors(instance)] if gid else self._domain(adapter_name, texts)
        return self.common(adapter_name), join(*own)

    def ending(self, adapter_name: str, texts: Texts, instance: Tensor) -> Piece:
        """I(x) [EOS] of each picture, or for "GID" D_c [EOS] of each class."""
        gid = self.configs[adapter_name].order == "GID"
        last = self._domain(adapter_name, texts) if gid else [self.reader.vectors(instance)]
        return join(*last, self.reader.tail())

    def common(self, adapter_name: str) -> Piece:
        """[SOS] G, and K where all classes have one and nothing stands between."""
        context = self.structured_prompt_context[adapter_name]
        contexts = [context.general, context.domain[0] if self._leads(adapter_name) else None]
        return join(self.reader.lead(), *(self.reader.vectors(c[None]) for c in contexts if c is not None))

    def _domain(self, adapter_name: str, texts: Texts) -> list[Piece]:
        """D_c = [K_dom(c); E(name_c)], without K where it stands in `common`."""
        K, names = self.structured_prompt_context[adapter_name].domain, self.reader.words(texts)
        if K is None or self._leads(adapter_name):
            return [names]
        return [self.reader.vectors(K if self.configs[adapter_name].domain == "one" else K[texts.groups]), names]

    def _leads(self, adapter_name: str) -> bool:
        """Whether one K follows G in every prompt."""
        config, context = self.configs[adapter_name], self.structured_prompt_context[adapter_name]
        between = config.looks() and config.order == "GID"
        return context.domain is not None and config.domain == "one" and not between

    @torch.no_grad()
    def hand_written(self, texts: Texts, chunk_size: int) -> Tensor:
        """(C, e): the base model's features of the words as they stand."""
        pieces = (
            [self.reader.lead(), self.reader.words(part), self.reader.tail()] for part in texts.chunks(chunk_size)
        )
        with base_alone(self._model[0]):
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

        return self.keep(BASE, template, features)

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
        """`compute()`, or what it gave since the adapter, the model and the class list last changed; `BASE`: no adapter's."""
        of_base, model = adapter_name == BASE, self._model[0]
        if torch.compiler.is_compiling() or (self.trains() and not of_base):
            return compute()
        context = nn.Module() if of_base else self.structured_prompt_context[adapter_name]
        own = [p.detach() for name, p in context.named_parameters() if not name.startswith("attention.")]
        switches = [(*m.active_adapters, m.disable_adapters, *m.merged_adapters) for m in switched(model)]
        precision = autocast_dtype(device_of(self.reader.embedding))
        aside = trained_beside(model) if of_base else set()  # changes with every step
        state = precision, switches, [(id(p), p._version) for p in model.parameters() if id(p) not in aside]
        found = self.kept.get((adapter_name, kind))
        if found is None or found.state != state or not all(map(torch.equal, found.own, own)):
            with torch.inference_mode(False), torch.no_grad():  # so that any later call may use it
                found = Kept(state, [p.clone() for p in own], compute())
            self.kept[adapter_name, kind] = found
        return found.value

    def known(self, adapter_name: str, texts: Texts, instance: Tensor | None) -> Any:
        """What the chunks of classes share: the pictures' prefixes ("GID"), or what is kept of the class list."""
        config = self.configs[adapter_name]
        if instance is not None and config.order == "GID":
            return self.reader.prefix(*self.beginning(adapter_name, texts, instance))
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
        size = self.configs[adapter_name].chunk_size
        common, own = self.beginning(adapter_name, texts, instance)
        chunks = (own.rows(slice(start, start + size)) for start in range(0, own.count, size))
        return PrefixStates.cat([cast(PrefixStates, self.reader.prefix(common, chunk)) for chunk in chunks])

    # --- logits ---

    def instance(self, adapter_name: str, Z: Tensor, real: Tensor | None = None) -> Tensor | None:
        """I(x) (B, M_i, d_t) of the patches Z (B, S, d_v); None where the prompt doesn't look at the picture."""
        context = self.structured_prompt_context[adapter_name]
        return context.attention(context.instance, Z, real) if self.configs[adapter_name].looks() else None

    def cosines(
        self,
        adapter_name: str,
        v: Tensor,
        Z: Tensor,
        texts: Texts,
        hand: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """v(x) . w_c(x), (B, C), and the mean of 1 - w_c(x) . hand_c where `hand` (C, e) is given.

        Args:
            v: The pictures' embeddings (B, e), of norm 1.
            Z: Their patches (B, S, d_v).
            real: (B, S), 0 at patches that fill a picture up; None where there are none.
        """
        config, instance = self.configs[adapter_name], self.instance(adapter_name, Z, real)
        known = self.known(adapter_name, texts, instance)
        again = self.trains() and (len(texts) > config.chunk_size or is_checkpointing(self._model[0]))
        found = []
        for start in range(0, len(texts), config.chunk_size):
            rows = slice(start, start + config.chunk_size)
            by_picture = config.order == "GID" and instance is not None
            mine = (
                known if known is None or by_picture else known[rows] if isinstance(known, Tensor) else known.rows(rows)
            )
            part = (adapter_name, v, Z, real, texts.rows(rows), instance, mine, None if hand is None else hand[rows])
            # Recomputed in the backward pass, so that what is held for it doesn't grow with the class count; notes on
            # each saved tensor, to check the second run by, would.
            found.append(
                checkpoint(self._chunk, *part, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
                if again
                else self._chunk(*part)
            )
        off = None if hand is None else torch.stack([o for _, o in found if o is not None]).sum() / len(texts)
        return torch.cat([cos for cos, _ in found], dim=1), off

    def _chunk(
        self,
        adapter_name: str,
        v: Tensor,
        Z: Tensor,
        real: Tensor | None,
        texts: Texts,
        instance: Tensor | None,
        known: Any,
        hand: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        w = self.features(adapter_name, texts, instance, known)
        if self.configs[adapter_name].mode == "feature":
            w = F.normalize(self.structured_prompt_context[adapter_name].attention(w[0], Z, real), dim=-1)
        off = None if hand is None else (1 - (w * hand).sum(dim=-1)).mean(dim=0).sum()
        return (w.to(v.dtype) @ v[..., None])[..., 0], off

    def shortlisted(self, adapter_name: str, v: Tensor, Z: Tensor, texts: Texts, real: Tensor | None = None) -> Tensor:
        """(B, C): v(x) . w_c(x) for the classes that static prompts rank first; the others' static ones, held below."""
        config, instance = self.configs[adapter_name], self.instance(adapter_name, Z, real)
        assert instance is not None
        cos = v @ self.static(adapter_name, texts).to(v.dtype).T
        top = cos.topk(min(config.shortlist or 0, len(texts)), dim=1).indices  # (B, k)
        known = self.known(adapter_name, texts, instance)
        if known is None and self.reader.reuses_prefix():
            known = self._prefixes(adapter_name, texts, instance)
        found = []
        for chosen in top.split(config.chunk_size, dim=1):
            classes = chosen.flatten()
            own, times = texts.rows(classes), chosen.shape[1]
            if config.order == "GID":
                w = self.reader.continued(known, self.ending(adapter_name, own, instance))
            else:
                begun = self.reader.prefix(*self.beginning(adapter_name, own, instance)) if known is None else known.rows(classes)  # fmt: skip
                w = self.reader.continued(begun, self.ending(adapter_name, own, instance).repeat_each(times))
            found.append((w.flatten(0, 1).unflatten(0, (-1, times)).to(v.dtype) @ v[..., None])[..., 0])
        best = torch.cat(found, dim=1)
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
        if not torch.compiler.is_compiling() and not len(pixel_values):
            raise ValueError("The batch is empty: pixel_values holds no picture.")
        model = self._model[0]
        with in_eval(model):
            out = model.get_image_features(pixel_values=pixel_values, return_dict=True, **image_inputs)
        return F.normalize(out.pooler_output, dim=-1), patches(
            self._convolutions, pixel_values, out.last_hidden_state.detach()
        )

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
        if self._model[0].training and self.trains() and not torch.compiler.is_compiling():
            self.kept = {
                key: found for key, found in self.kept.items() if key[0] == BASE
            }  # the rest ends with the step
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
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PeftModel names what it got no
        if unread := kwargs.keys() - self.image_inputs:
            raise TypeError(f"Nothing reads {sorted(unread)} while an adapter of this method is active.")
        v, Z = self.look(pixel_values, **kwargs)
        real, hand = kwargs.get("pixel_attention_mask"), None
        if config.text_anchor and (labels is not None or return_loss):
            captions = input_ids is not None
            hand = self.hand_written(texts, config.chunk_size) if captions else self.templated(config.anchor_template, config.chunk_size)  # fmt: skip
        if config.shortlist is not None and shortlist:
            cos, off = self.shortlisted(adapter_name, v, Z, texts, real), None
        else:
            cos, off = self.cosines(adapter_name, v, Z, texts, hand, real)
        logits = scaled(model, cos)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels.long())
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
        given = {name: value for name, value in kwargs.items() if value is not None}
        if len(args) > 2:
            return self.stand_in.original(*args, **given)
        named = {
            name: value for name, value in zip(("input_ids", "pixel_values"), args, strict=True) if value is not None
        }
        return self.stand_in.original(**named, **given)


def in_order(values: Any) -> Any:
    """The values of a list, a tuple, an array or their like as a list; anything else as it is."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return (
        values if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable) else list(values)
    )


def check_labels(labels: Tensor, pixel_values: Tensor | None, classes: int) -> None:
    if (
        labels.ndim != 1
        or labels.is_floating_point()
        or (pixel_values is not None and labels.shape[0] != pixel_values.shape[0])
    ):
        raise ValueError(
            f"labels must be one class number a picture, got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if torch.compiler.is_compiling() or not labels.shape[0]:
        return
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"Label {high if high >= classes else low} is no place in the list of {classes} classes.")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """In what a device computes now; None without autocast, in what the weights are."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


# --- the dual encoder ------------------------------------------------------------------------------------------------


def switched(model: nn.Module) -> list[Any]:
    """Whatever PEFT switches in a model: layers of any method, and modules that are trained beside one."""
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def trained_beside(model: nn.Module) -> set[int]:
    """Identities of the parameters that adapters, and modules trained beside them, have put into a model."""
    parts = (getattr(m, name, None) for m in switched(model) for name in m.adapter_layer_names)
    return {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """The model without anything that was trained on it. No `requires_grad` changes, as it would by PEFT's own switch."""
    live = [m for m in switched(model) if not m.disable_adapters]
    for m in live:
        m._disable_adapters = True
    try:
        yield
    finally:
        for m in live:
            m._disable_adapters = False


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


def patches(convolutions: Sequence[nn.Module], pixel_values: Tensor, states: Tensor) -> Tensor:
    """The vision tower's states (B, S, d_v) or (B, d_v, H, W) without CLS, registers and their like: (B, S', d_v).

    Args:
        convolutions: What reads the pixels: one that cuts them into patches says how many there are.
    """
    if states.ndim == 4:
        return states.flatten(2).transpose(1, 2)
    if len(convolutions) != 1:
        return states
    patch: Any = convolutions[0]
    high, wide = (
        (size - kernel) // stride + 1
        for size, kernel, stride in zip(pixel_values.shape[-2:], patch.kernel_size[-2:], patch.stride[-2:], strict=True)
    )
    return states[:, max(states.shape[1] - high * wide, 0) :]


def text_tower(model: Any, found: Anatomy) -> str:
    """Path of a dual encoder's text tower.

    Raises:
        NoMatchingPeftModuleError: the model is no dual encoder.
    """
    towers = [t.path for t in found.towers if t.path and any(is_below(e, t.path) for e in token_embeddings(model))]
    dual = all(hasattr(model, f"get_{kind}_features") for kind in ("text", "image"))
    scale = any(isinstance(getattr(model, name, None), Tensor) for name in ("logit_scale", "temperature"))
    if not dual or not scale or len(towers) != 1 or any(t.name == "fusion" for t in found.towers):
        raise NoMatchingPeftModuleError(
            f"{found.model_class} doesn't compare pictures with texts by features of their own, which is how classes are "
            "told apart here. Use a dual encoder (CLIP, SigLIP, ChineseCLIP, AltCLIP, VisionTextDualEncoder, ...)."
        )
    return towers[0]


@torch.no_grad()
def widths(model: Any, tower: str, found: Anatomy) -> tuple[int, int, int]:
    """(d_t, d_v, e): of the token embeddings, the patches and the shared space, measured."""
    embedding = model.get_submodule(next(p for p in token_embeddings(model) if is_below(p, tower)))
    ids = torch.ones(1, 2, dtype=torch.long, device=device_of(embedding))
    mask = None if ids.is_meta else ids  # what a mask holds would be asked
    text = type(model).get_text_features(model, input_ids=ids, attention_mask=mask, return_dict=True)
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    convolutions = [model.get_submodule(path) for path in pixel_readers(model)]
    if convolutions and isinstance(size, (int, list, tuple)):
        shape = (size, size) if isinstance(size, int) else tuple(size)
        pixels = torch.zeros(1, 3, *shape, dtype=convolutions[0].weight.dtype, device=device_of(convolutions[0]))
        picture = type(model).get_image_features(model, pixel_values=pixels, return_dict=True).last_hidden_state
        patch_width = patches(convolutions, pixels, picture).shape[-1]
    else:
        patch_width = next(t.hidden_size for t in found.towers if t.name == "vision") or 0
    return embedding.embedding_dim, patch_width, text.pooler_output.shape[-1]
