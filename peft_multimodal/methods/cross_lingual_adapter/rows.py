"""A batch whose rows are of several languages: each row as in a batch of its language alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...core.parts import BASE, rows_by_name
from .text_tower import pooled_of


class Group(NamedTuple):
    """The rows of one language, the columns that their texts take, and what its tower gives for them."""

    rows: Tensor
    columns: slice
    output: Any


def by_language(
    run: Callable[[Tensor, Tensor, str], Any],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    names: Sequence[str],
    limit: int | None,
    level: str,
) -> BaseModelOutputWithPooling:
    """What a tower that itself reads `limit` tokens gives for texts (B, L): row i by `run(ids, mask, names[i])`."""
    if attention_mask is None:
        raise ValueError("A batch of several languages needs its attention_mask: each language pads its own way.")
    groups = []
    for name, rows in rows_by_name(names, input_ids.device).items():
        columns = _columns(attention_mask[rows], limit if name == BASE else 0)
        output = run(input_ids[rows, columns], attention_mask[rows, columns], name)
        groups.append(Group(rows, columns, output))
    first = pooled_of(groups[0].output)
    pooled = first.new_zeros(len(names), first.shape[-1])
    for group in groups:
        pooled[group.rows] = pooled_of(group.output)
    widths = {group.output.last_hidden_state.shape[-1] for group in groups}
    # A tower that pools to another width: nobody reads its token states.
    last = pooled[:, None] if len(widths) > 1 else _joined(groups, input_ids.shape, lambda o: o.last_hidden_state)
    hidden = _joined(groups, input_ids.shape, lambda o: o.hidden_states[-1]) if level == "tokens" else last
    return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=(hidden,))


def _columns(mask: Tensor, limit: int | None) -> slice:
    """The columns that the texts of one language take, behind which stands other languages' padding.

    All columns where so many may be read: a tower may read its padding, as SigLIP does, which pools the last position.
    """
    if limit is None or mask.shape[1] <= limit:
        return slice(0, mask.shape[1])
    columns = mask.any(dim=0).nonzero().flatten().tolist() or [0]
    return slice(columns[0], columns[-1] + 1)


def _joined(groups: Sequence[Group], shape: Sequence[int], states_of: Callable[[Any], Tensor]) -> Tensor:
    """The groups' sequences (B, L, d) at the places that their texts have in the batch."""
    first = states_of(groups[0].output)
    whole = first.new_zeros(*shape, first.shape[-1])
    for rows, columns, output in groups:
        states = states_of(output)
        whole[rows, columns] = states
        whole[rows, 0] = states[:, 0]  # who reads token states reads the first, also behind padding on the left
    return whole
