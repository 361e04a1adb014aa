"""What a model's modules are called in its released checkpoint, by transformers' own renaming of weights.

A release of transformers may move modules, such as LLaVA's `language_model.model.layers` to `model.language_model.layers`. It
then keeps the renaming with the model class, to read and write checkpoints under the names of old. Servers go by these.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel


def released_names(model: Any, paths: Iterable[str]) -> dict[str, str | None]:
    """{module path: its path in the released checkpoint}; None where the checkpoint keeps the weight in another form, such as
    fused with others or with its rows in another order."""
    paths = list(paths)
    if not isinstance(model, PreTrainedModel):
        return {path: path for path in paths}
    renamings, converters = _backwards(model)
    return {path: _renamed(path, renamings, converters) for path in paths}


def _backwards(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """The renamings and the changes of form that lead from the model to its checkpoint, in their order.

    A prefix that a class takes off or puts on is left as it is: whether a checkpoint has it, only its file tells.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    prefix = getattr(loading, "PrefixChange", ())
    known = [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, prefix)]
    back = [transform.reverse_transform() for transform in reversed(known)]
    is_renaming = [isinstance(transform, loading.WeightRenaming) for transform in back]
    return (
        [t for t, renames in zip(back, is_renaming, strict=True) if renames],
        [t for t, renames in zip(back, is_renaming, strict=True) if not renames],
    )


def _renamed(path: str, renamings: list[Any], converters: list[Any]) -> str | None:
    key = f"{path}.weight"
    if any(converter.rename_source_key(key)[1] is not None for converter in converters):
        return None
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key.removesuffix(".weight")
