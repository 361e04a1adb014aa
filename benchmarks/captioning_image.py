"""Prompts with images and what the model wrote behind them: `docs/captioning.png`, from a result of the captioning task.

    python -m benchmarks.captioning_image

The prompts are the first of each kind of the test's, not chosen by what became of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from . import experiment as experiments
from .assets.captions import image
from .records import RESULTS, Record, read_records
from .tasks import captioning

DOCS = Path("docs/captioning.png")
EACH = {"names": 2, "keywords": 2, "sentences": 2, "questions": captioning.SHOTS + 1}
"""How many prompts of each kind are shown."""
CONSOLE = Console()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.captioning_image", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=DOCS)
    options = parser.parse_args()
    records = read_records("captioning", options.results)
    found = [r for r in records if r.experiment == captioning.MAIN and r.seed == options.seed]
    if not found:
        parser.error(
            f"there is no result of {captioning.MAIN}, seed {options.seed}, in {options.results}: run it first"
        )
    draw(found[0], options.to)
    CONSOLE.print(f"wrote {options.to}")


def draw(record: Record, path: Path) -> None:
    """A row a prompt: the shots with their captions, and the image that was asked about with what was written.

    Questions have no shots and share the last row.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = experiments.load("captioning", record.experiment).settings
    columns = captioning.SHOTS + 1
    rows: list[list[tuple[captioning.Shown, str | None]]] = []  # what is shown, and what was written of it
    for kind, number in EACH.items():
        exam = captioning.exam(kind, "test", settings["things"], settings["candidates"])
        if [c.thing for c in exam.asked] != record.items["asked"][kind]:
            raise ValueError("The result is of other test images than the assets have now: run the task again.")
        prompts, written = exam.prompts(captioning.SHOTS), record.items[f"{kind}_written_own"]
        chosen = [i * (len(prompts) // number) for i in range(number)]
        asked: list[tuple[captioning.Shown, str | None]] = [(prompts[i][-1], written[i]) for i in chosen]
        if kind == "questions":
            rows.append(asked)
        else:
            rows += [[*((s, None) for s in prompts[i][:-1]), last] for i, last in zip(chosen, asked, strict=True)]

    figure, grid = plt.subplots(len(rows), columns, figsize=(2.3 * columns, 2.1 * len(rows)), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, row in zip(grid, rows, strict=True):
        for axes, (shown, answer) in zip(line, row, strict=True):
            axes.imshow(image(shown.kind, shown.image))
            said = shown.answer if answer is None else f"{shown.question} {answer}".strip()
            color = "black" if answer is None else "tab:red"
            axes.set_title(_wrapped(said), fontsize=8, color=color, y=-0.02, va="top")
            if answer is not None:
                axes.annotate(
                    f"({_wrapped(shown.answer)})", (0.5, -0.32), xycoords="axes fraction", ha="center", va="top",
                    fontsize=7, color="gray",
                )  # fmt: skip
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.05, wspace=0.1, hspace=0.55)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _wrapped(text: str, width: int = 30, lines: int = 2) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


if __name__ == "__main__":
    main()
