"""List the assets, or prepare those that are named: `python -m benchmarks.assets [NAME ...]`.

`all` prepares every one but those that are only prepared by name, as they take minutes of CPU.
"""

from __future__ import annotations

import argparse
import sys
import time

import benchmarks.assets as assets
from benchmarks.assets.captions import KINDS

SLOW = ("blip_retrieval", "blip_vqa", "caption_lm", "patch_states")
ALL = (
    "emoji_images",
    "animated_emoji",
    "easy_vqa",
    "photos",
    "translation_pairs",
    "dinov2_small",
    "minilm",
    "e5_small",
    "english_clip",
    "smollm2",
)
NAMES = ALL + SLOW


def prepare(name: str) -> object:
    """What there is to say about the asset once it is there: its folder or table, the pairs of each language."""
    if name == "translation_pairs":
        return {language: len(assets.translation_pairs(language)) for language in assets.LANGUAGES}
    if name == "patch_states":
        return {kind: list(assets.patch_states(kind).shape) for kind in KINDS}
    return getattr(assets, name)()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.assets", description=__doc__.split(":")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*NAMES, "all")))
    names = parser.parse_args().names
    if unknown := set(names) - {*NAMES, "all"}:
        parser.error(f"no asset is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if not names:
        print(f"Kept in {assets.cache_dir()}:")
        for name in NAMES:
            print(f"  {name:17} {getattr(assets, name).__doc__.splitlines()[0]}")
        print(f"`all` leaves out {' and '.join(SLOW)}, which take minutes of CPU.")
    wanted = {*names, *(ALL if "all" in names else ())}
    for name in (name for name in NAMES if name in wanted):
        started = time.perf_counter()
        try:
            made = prepare(name)
        except assets.AssetError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"{name} ({time.perf_counter() - started:.0f} s): {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
