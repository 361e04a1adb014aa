"""The one way to answer in place of a module's method (`forward`, `generate`, `get_text_features`), and to give it back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class StandIn:
    """Answers the calls of one method of one module, in place of the module.

    Several may stand in for the same method: the latest one answers, and what it calls `original` is the one before it.
    One that is `innermost` goes below those that there are, so that models don't differ by the order in which parts came.
    They leave in any order. Nothing is written to a class, and nothing is kept between calls; a deep copy or a pickled
    copy of the whole model answers by its own parts.

        self.forward_of = StandIn(tower, "forward", self.forward)   # from now on tower(x) is self.forward(x)
        self.forward_of.original(x)                                 # the tower as it is
        self.forward_of.give_back()

    Args:
        module: Whose method it is.
        name: The method's name.
        answer: What is called instead; None passes calls on, for the sake of `takes`.
        takes: Names of keyword arguments that the answer reads beside the method's own: `Trainer` drops columns of a data
            set that the signature of `forward` doesn't name.
        signature: What `inspect.signature` shows; by default the method's own, with `takes`.
        innermost: Whether it answers below all others.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        answer: Callable[..., Any] | None = None,
        takes: Sequence[str] = (),
        signature: inspect.Signature | None = None,
        innermost: bool = False,
    ) -> None:
        self.module, self.name = module, name
        self.below: Callable[..., Any] | None = None
        self.answer: Callable[..., Any] = answer or self.original
        self.takes, self.signature = tuple(takes), signature
        taken = module.__dict__.get(name)
        if not isinstance(taken, Taken):
            taken = Taken(module, name)
        taken.add(self, innermost)
        self._taken: Taken | None = taken

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The method without this stand-in."""
        if self.below is not None:
            return self.below(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def parameters(self) -> list[str]:
        """Names of the method's parameters without this stand-in."""
        return list(self._taken.signature(self).parameters) if self._taken is not None else []

    def give_back(self) -> None:
        """Leave. Once is enough, and twice is no error."""
        if self._taken is not None:
            self._taken.remove(self)
            self._taken = None

    remove = give_back  # as hooks' handles call it


class Taken:
    """What a module's instance holds under the name of a method that is answered by others."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.own = module.__dict__.get(name)  # of accelerate's, or a user's
        self.stand_ins: list[StandIn] = []
        module.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.stand_ins:
            return self.stand_ins[-1].answer(*args, **kwargs)
        if self.own is not None:
            return self.own(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return self.signature()

    def signature(self, below: StandIn | None = None) -> inspect.Signature:
        """The method's, or as it is below a stand-in. Made anew: annotations may hold what can't be pickled."""
        found = inspect.signature(self.own or getattr(type(self.module), self.name).__get__(self.module))
        for stand_in in self.stand_ins:
            if stand_in is below:
                break
            found = stand_in.signature or _with(found, stand_in.takes)
        return found

    @property
    def is_answered(self) -> bool:
        """Whether a stand-in does more than pass calls on."""
        return any(s.answer != s.original for s in self.stand_ins)

    def add(self, stand_in: StandIn, innermost: bool = False) -> None:
        self.stand_ins.insert(0 if innermost else len(self.stand_ins), stand_in)
        self._link()

    def remove(self, stand_in: StandIn) -> None:
        self.stand_ins = [other for other in self.stand_ins if other is not stand_in]
        self._link()
        if self.stand_ins or self.module.__dict__.get(self.name) is not self:
            return  # where accelerate has taken the method over since, it goes on calling this, which passes calls on
        if self.own is None:
            del self.module.__dict__[self.name]
        else:
            self.module.__dict__[self.name] = self.own

    def _link(self) -> None:
        below = self.own
        for stand_in in self.stand_ins:
            stand_in.below = below
            below = stand_in.answer


def _with(signature: inspect.Signature, names: Sequence[str]) -> inspect.Signature:
    """The signature with keyword arguments of these names, as far as it lacks them."""
    parameters = list(signature.parameters.values())
    at = len(parameters) - any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    new = [n for n in names if n not in signature.parameters]
    parameters[at:at] = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in new]
    return signature.replace(parameters=parameters)
