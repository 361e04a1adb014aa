"""python -m peft_multimodal doctor MODEL_OR_PATH [ADAPTER] [--serve SERVER] [--step] [--json]"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 1 where the doctor found a problem."""
    parser = argparse.ArgumentParser(prog="python -m peft_multimodal", description="Looks at models and adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="which towers a model has, what each method would adapt, whether an adapter fits; exit code 1 if not",
    )
    doctor.add_argument("model", metavar="MODEL_OR_PATH", help="a folder or a Hub id; only its config is read")
    doctor.add_argument("adapter", metavar="ADAPTER", nargs="?", help="a folder or a Hub id")
    doctor.add_argument("--subfolder", help="of the adapter")
    doctor.add_argument("--revision", help="of the adapter")
    doctor.add_argument(
        "--serve", metavar="SERVER", help="would it load the adapter? vllm, sglang or llama.cpp; of any LoRA"
    )
    doctor.add_argument(
        "--step", action="store_true", help="load both and take a step: does everything of the adapter train?"
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    given = parser.parse_args(arguments)

    from transformers.utils import logging

    from .doctor import examine
    from .files.servers import SERVERS
    from .serving import check_serving
    from .stepping import take_step

    if given.serve is not None and (given.serve not in SERVERS or given.adapter is None):
        doctor.error(f"--serve takes one of {', '.join(SERVERS)}, and an ADAPTER before it")
    if given.step and given.adapter is None:
        doctor.error("--step takes an ADAPTER before it")
    logging.set_verbosity_error()
    place = {key: value for key in ("subfolder", "revision") if (value := getattr(given, key)) is not None}
    if given.serve is not None:
        report: Any = check_serving(given.model, given.adapter, given.serve, **place)
    elif given.step:
        report = take_step(given.model, given.adapter, **place)
    else:
        report = examine(given.model, given.adapter, **place)
    print(json.dumps(report.as_dict(), indent=2) if given.json else report)
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
