"""Adapt a real model to real languages, then to a new style of images: `make quickstart`, minutes on two CPU cores.

The two jobs are `quickstart_language.py` and `quickstart_retrieval.py`, which also run alone. When both are done, one
screen shows their results and the paths of their images.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

from . import quickstart_language, quickstart_retrieval

THREADS = 2
CONSOLE = Console()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart", description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", action="store_true", help="write the images to docs/ too")
    parser.add_argument("--steps", type=int, help="train so many steps only, to see that it works")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    steps: dict[str, Any] = {} if options.steps is None else {"steps": options.steps}
    results = [job.run(docs=options.docs, **steps) for job in (quickstart_language, quickstart_retrieval)]
    CONSOLE.rule("Results on unseen concepts")
    for table, _ in results:
        CONSOLE.print(table)
    for path in (path for _, images in results for path in images):
        CONSOLE.print(f"Image: {path}")


if __name__ == "__main__":
    main()
