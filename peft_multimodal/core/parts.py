"""What a method puts into a model: wrapped layers and attached parts, and what these tell each other in a call."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from . import anatomy

BASE = "__base__"  # PEFT's name for rows that no adapter acts on


@dataclass
class Call:
    """What is known in one call."""

    is_open: bool = False
    seen: Any = None
    values: dict[Any, Any] = field(default_factory=dict)


class CallScope(threading.local):
    """What the submodules of one module tell each other during one call of it, in one thread.

    Hooks of the owning module open and close it, inside the region that gradient checkpointing recomputes; so a
    recomputation (on a GPU in another thread) opens its own, two threads never meet, and nothing outlives the call.
    `torch.compile` traces it without a graph break. Where the model itself has one, a part of it reads what another part
    has written: such writes reach ordinary objects, but get lost on an object that differs from thread to thread.
    """

    def __init__(self) -> None:
        self._call = Call()  # of this thread

    @property
    def is_open(self) -> bool:
        return self._call.is_open

    @property
    def seen(self) -> Any:
        return self._call.seen

    @seen.setter
    def seen(self, value: Any) -> None:
        self._call.seen = value

    @property
    def values(self) -> dict[Any, Any]:
        return self._call.values

    @values.setter
    def values(self, values: dict[Any, Any]) -> None:
        self._call.values = values

    def open(self, *_: Any) -> None:
        self.close()  # an interrupt in an earlier call may have left it open
        self._call.is_open = True

    def close(self, *_: Any) -> None:
        call = self._call
        call.is_open, call.seen, call.values = False, None, {}

    def copy(self) -> Call:
        """What is known now, for `reopened`."""
        return Call(self.is_open, self.seen, dict(self.values))

    @contextmanager
    def reopened(self, call: Call) -> Iterator[None]:
        """Within it this call is known, in whatever thread; behind it what was known before."""
        now = self._call
        before = now.is_open, now.seen, now.values
        now.is_open, now.seen, now.values = call.is_open, call.seen, dict(call.values)
        try:
            yield
        finally:
            now.is_open, now.seen, now.values = before

    def attach(self, owner: nn.Module) -> list[Any]:
        """Open and close with each call of `owner`; returns the hooks' handles."""
        return [owner.register_forward_pre_hook(self.open), owner.register_forward_hook(self.close, always_call=True)]

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()  # a copy or a pickled model starts with a closed scope


def check_rows(
    adapter_names: Sequence[str], known: Collection[str], inputs: Collection[Any] = (), hint: str = ""
) -> None:
    """Refuse `adapter_names=[...]` that aren't one known adapter for each row of a batch.

    Args:
        known: The adapters that there are.
        inputs: Of the call; their first dimensions say how many rows the batch has.
        hint: What else to say where one is unknown.
    """
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"adapter_names must be a list with one adapter's name a row, got {adapter_names!r}.")
    if unknown := sorted(set(adapter_names) - {BASE, *known}):
        load = "Load it: model.load_adapter(folder, name)."
        raise ValueError(f"No adapter for {unknown}; there are {[BASE, *known]}. {load} {hint}".rstrip())
    rows = sorted({len(value) for value in inputs if isinstance(value, Tensor) and value.ndim})
    if rows and len(adapter_names) not in rows:
        raise ValueError(
            f"{len(adapter_names)} adapter_names for {' or '.join(map(str, rows))} rows: name one "
            f"adapter a row, {BASE!r} for the base model."
        )


def names_of_rows(adapter_names: Sequence[str], rows: int, copies: int = 1) -> list[str]:
    """The adapter of each row of a batch, or of the `copies` of each row that generation has made (beams)."""
    for times in (1, copies):
        if rows == times * len(adapter_names):
            return [name for name in adapter_names for _ in range(times)]
    raise ValueError(
        f"{len(adapter_names)} adapter_names for {rows} rows: this module doesn't see the batch row by row. Call "
        "model.set_adapter(name) and pass the rows of each adapter separately."
    )


def rows_by_name(adapter_names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """{adapter: its rows of a batch, int64 (n,)}, in the order in which the names first come."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        rows.setdefault(name, []).append(row)
    return {name: torch.tensor(of_name, device=device) for name, of_name in rows.items()}


@contextmanager
def rows_in(
    model: nn.Module,
    scopes: Iterable[CallScope],
    adapter_names: Sequence[str],
    known: Collection[str],
    inputs: Collection[Any],
    copies: int = 1,
) -> Iterator[None]:
    """Within it, in this thread, the scopes of a method's parts hold the adapter of each row, for `rows_of`.

    Args:
        known, inputs: As `check_rows` takes them.
        copies: Of each row, that generation makes.
    """
    if model.training:
        raise ValueError("adapter_names=[...] is for inference: call model.eval(), and train one adapter at a time.")
    check_rows(adapter_names, known, inputs)
    rows: dict[Any, dict[str, Tensor]] = {}  # all parts share them
    with rows_beside(model, adapter_names, copies), ExitStack() as stack:
        for scope in scopes:
            scope.open()
            scope.values.update(adapter_names=list(adapter_names), copies=copies, rows=rows)
            stack.callback(scope.close)
        yield


def rows_of(scope: CallScope, rows: int, device: torch.device) -> dict[str, Tensor]:
    """{adapter: its rows of a batch} for a part that sees so many, within `rows_in`; made once for all parts."""
    made, key = scope.values["rows"], (rows, device)
    if key not in made:
        made[key] = rows_by_name(names_of_rows(scope.values["adapter_names"], rows, scope.values["copies"]), device)
    return made[key]


@contextmanager
def rows_beside(model: nn.Module, adapter_names: Sequence[str], copies: int = 1) -> Iterator[None]:
    """Within it, in this thread, a module that is trained beside adapters (`modules_to_save`) serves row i by the copy of
    `adapter_names[i]`, or as the base model has it where that adapter brings none: as PEFT does it for LoRA.
    """
    scope = CallScope()

    def route(wrapper: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not scope.is_open:  # another thread's call
            return None
        there = wrapper._get_available_adapters()
        states = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        names = names_of_rows(adapter_names, len(states), copies)
        return args, {**kwargs, "adapter_names": [name if name in there else BASE for name in names]}

    wrappers = {path: m for path, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    for path, wrapper in wrappers.items():
        if not isinstance(wrapper.original_module, _ROW_BY_ROW):
            raise ValueError(
                f"{path} is trained beside the adapters (modules_to_save) and is no linear, embedding or convolution, which "
                "alone can serve each row by its own adapter's copy. Call model.set_adapter(name) and pass the rows of each "
                "adapter separately."
            )
    handles = [m.register_forward_pre_hook(route, with_kwargs=True) for m in wrappers.values()]
    scope.open()
    try:
        yield
    finally:
        scope.close()
        for handle in handles:
            handle.remove()


_ROW_BY_ROW = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # PEFT's AuxiliaryTrainingWrapper names them


class MultimodalLayer(BaseTunerLayer):
    """Base of everything that a method puts into a model: wrapped layers and attached parts.

    `role` is the stored name. Containers named in `adapter_layer_names` are keyed by the adapter's name.
    """

    role: str
    cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting reads and sets it
    no_lora: str | None = None
    """What a part is called that has no place in a LoRA, where the method's others have: `export_lora(drop=...)` names it."""

    def enable_adapters(self, enabled: bool) -> None:
        # PEFT turns gradients off and on here, and so thaws adapters that were frozen on purpose.
        self._disable_adapters = not enabled

    def settle(self, adapter_name: str) -> None:
        """Bring a new adapter to the device of what it acts on."""
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self._get_available_adapters()

    def live_adapters(self) -> list[str]:
        """The adapters that act in this call."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if self.has_adapter(name)]

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor] | None:
        """A (R x d_in) and B (d_out x R) with B A = dW, an adapter's whole update of the wrapped weight, its scale included.

        None: this part changes no weight by itself. Methods that promise `lora` say here what theirs do.
        """
        return None


class HostedLayer(MultimodalLayer):
    """A layer whose adapters follow the device and dtype of another module, its host."""

    def host(self) -> nn.Module:
        """The module whose device and dtype the adapters follow."""
        raise NotImplementedError

    def settle(self, adapter_name: str) -> None:
        """Bring a new adapter to the host's device and dtype (which PEFT then raises to float32 unless told not to)."""
        self._move(adapter_name, None, cast=True)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        self._move(adapter_name, device, cast=False)  # PEFT calls it again on what it has loaded: don't round that

    def _move(self, adapter_name: str, device: torch.device | None, cast: bool) -> None:
        host = self.host()
        reference = next((p for p in host.parameters() if p.is_floating_point()), None)
        device = anatomy.device_of(host) if device is None else device
        if reference is None or device.type == "meta":
            return
        for name in self.adapter_layer_names:
            container: Any = getattr(self, name)
            if adapter_name in container:
                item = container[adapter_name]
                tensors = [item] if isinstance(item, Tensor) else [*item.parameters(), *item.buffers()]
                if not any(t.is_meta for t in tensors):
                    container[adapter_name] = item.to(device, reference.dtype if cast else None)


class Wrapper(nn.Module, HostedLayer):
    """Stands in a frozen module's place. What is asked of it beside a call is answered by the module."""

    def __init__(self, base_layer: nn.Module, role: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.role = role
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def host(self) -> nn.Module:
        return self.base_layer


class AttachedPart(nn.Module, HostedLayer):
    """A part that hangs below a module as a child of its own, acting through hooks or as a store, wrapping nothing.

    `hooks` are taken out with it: hooks' handles, stand-ins, and whatever else can `remove()` itself.
    """

    def __init__(self, host: nn.Module, role: str = "") -> None:
        super().__init__()
        self.role = role
        self.hooks: list[Any] = []
        self.merged_adapters: list[str] = []
        self._host = (host,)  # a tuple is not registered
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def host(self) -> nn.Module:
        return self._host[0]

    # PEFT's layers answer for the module that they wrap, and would ask themselves here without end.

    @property
    def weight(self) -> Tensor:
        raise AttributeError(f"{type(self).__name__} wraps no module and has no weight")

    @property
    def bias(self) -> Tensor:
        raise AttributeError(f"{type(self).__name__} wraps no module and has no bias")

    def remove_hooks(self) -> None:
        for handle in self.hooks:
            handle.remove()
        self.hooks = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Only noted: whether the adapter may be merged is checked once for the whole of it, by the tuner."""
        self.merged_adapters += [a for a in check_adapters_to_merge(self, adapter_names) if self.has_adapter(a)]

    def unmerge(self) -> None:
        self.merged_adapters.clear()


class InputGradients:
    """Forward hook of the modules that read tokens and pixels, for gradient checkpointing over frozen embeddings.

    Reentrant checkpointing passes no gradient on where no input requires one: a tower would stop training without a
    word. transformers marks the embeddings' outputs, but only those of models whose main input is `input_ids`; and its
    mark makes a leaf, which BLIP's embeddings then add to in place, an error. A marked copy serves all.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not output.is_leaf:
            return None
        checkpointing = embedding.training and is_checkpointing(self.model)
        return output.requires_grad_().clone() if output.requires_grad or checkpointing else None


def is_checkpointing(model: nn.Module) -> bool:
    """Whether gradient checkpointing is switched on in a transformers model."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the newer name first: the older warns
    name = next((n for n in names if hasattr(type(model), n)), "")
    return bool(getattr(model, name, False))
