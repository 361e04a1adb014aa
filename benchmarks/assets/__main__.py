"""List the assets, or prepare those that are named: `python -m benchmarks.assets [NAME ...]`, `all` for every one."""

from __future__ import annotations

import argparse
import sys
import time

import benchmarks.assets as assets

NAMES = ("emoji_pictures", "animated_emoji", "easy_vqa", "dinov2_small", "minilm", "english_clip", "blip_retrieval")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.assets", description=__doc__.split(":")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*NAMES, "all")))
    names = parser.parse_args().names
    if unknown := set(names) - {*NAMES, "all"}:
        parser.error(f"no asset is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if not names:
        print(f"Kept in {assets.cache_dir()}:")
        for name in NAMES:
            print(f"  {name:16} {getattr(assets, name).__doc__.splitlines()[0]}")
    for name in NAMES if "all" in names else names:
        started = time.perf_counter()
        try:
            made = getattr(assets, name)()
        except assets.AssetError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"{name} ({time.perf_counter() - started:.0f} s): {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
