"""With the oldest versions that are taken: every method on every family, run, trained a step, saved, loaded, switched off.

`make test-oldest` runs it in an environment of its own; pytest doesn't collect it.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

import accelerate
import peft
import torch
import transformers
from families import FAMILIES
from methods import CASES, METHODS, adapter, distance, run, wrap
from peft import PeftModel
from test_trainer import NAMES, stock, trained_on


def works(name: str, method: str, folder: Path) -> None:
    family = FAMILIES[name]
    base = family.build()
    expected = run(family, base)
    model = wrap(family, method, base=base)
    output = run(family, model)
    model.save_pretrained(folder)
    assert distance(run(family, PeftModel.from_pretrained(family.build(), folder)), output) <= 1e-5
    with model.disable_adapter():
        assert distance(run(family, model), expected) <= 1e-6  # torch 2.6 rounds SigLIP's attention anew in every call


def trains(method: str, folder: Path) -> None:
    trainer = stock(method, folder, max_steps=2)
    before = {name: weight.clone() for name, weight in adapter(trainer.model).items()}
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in adapter(trainer.model).items())


def main() -> None:
    torch.set_num_threads(1)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)}
    print(*(f"{name} {version}" for name, version in versions.items()))
    failed = []
    cases = [(f"{method} on {name}", works, (name, method)) for name, method in CASES]
    cases += [
        (f"{method} trains on {trained_on(method).name}", trains, (method,)) for method in NAMES if method in METHODS
    ]
    for title, check, arguments in cases:
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(*arguments, Path(folder))  # type: ignore[operator]
            except Exception:
                failed.append(title)
                print(title, traceback.format_exc(limit=-1), sep="\n")
    print(f"{len(cases) - len(failed)} of {len(cases)} work")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
