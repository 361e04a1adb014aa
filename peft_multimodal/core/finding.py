"""What a check tells its user: the doctor's, that of a training step, that of a server's rules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something that the user should know.

    Args:
        level: "problem" (it won't work as it stands) or "warning".
        what: What was found.
        way_out: What to do.
    """

    level: str
    what: str
    way_out: str = ""
