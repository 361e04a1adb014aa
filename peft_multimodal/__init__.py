"""Parameter-efficient methods for vision-language models, as PEFT methods.

Importing the package registers the methods: afterwards `peft.get_peft_model`, `PeftModel.from_pretrained` and the rest
of PEFT know them. Training, evaluation and data names load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .core.anatomy import describe
from .core.companions import CardNotes
from .core.config import MultimodalConfig
from .core.matching import matched_modules
from .core.scaling import adapter_scale
from .files.export import export_lora
from .files.saving import AdapterError, load, push_to_hub, save
from .methods import *  # noqa: F403  the configs and models of all methods
from .methods import __all__ as _METHODS
from .policy import TowerPolicy, Train

if TYPE_CHECKING:
    from .data import FiniteBatches, ImageTextCollator, LanguageProcessor, QuestionAnswerCollator
    from .evaluation import RetrievalRecall, VQAAccuracy, scale_curve
    from .images import read_image
    from .interleaved import InterleavedProcessor
    from .training.callback import AdapterCallback
    from .training.check import check_training
    from .training.checking import CheckTraining
    from .training.checkpoints import last_checkpoint
    from .training.contrastive import ContrastiveTrainer
    from .training.distillation import CrossLingualTrainer, DistillationLoss
    from .training.hard_samples import HardSampleBank
    from .training.learning_rates import parameter_groups
    from .training.trainer import ImageTextRetrievalTrainer

_LAZY = {
    "AdapterCallback": "training.callback",
    "CheckTraining": "training.checking",
    "ContrastiveTrainer": "training.contrastive",
    "FiniteBatches": "data",
    "HardSampleBank": "training.hard_samples",
    "CrossLingualTrainer": "training.distillation",
    "DistillationLoss": "training.distillation",
    "ImageTextCollator": "data",
    "InterleavedProcessor": "interleaved",
    "LanguageProcessor": "data",
    "QuestionAnswerCollator": "data",
    "read_image": "images",
    "RetrievalRecall": "evaluation",
    "scale_curve": "evaluation",
    "check_training": "training.check",
    "last_checkpoint": "training.checkpoints",
    "parameter_groups": "training.learning_rates",
    "VQAAccuracy": "evaluation",
    "ImageTextRetrievalTrainer": "training.trainer",
}

__all__ = [
    "AdapterCallback",
    "AdapterError",
    "CardNotes",
    "CheckTraining",
    "ContrastiveTrainer",
    "CrossLingualTrainer",
    "DistillationLoss",
    "FiniteBatches",
    "HardSampleBank",
    "ImageTextCollator",
    "ImageTextRetrievalTrainer",
    "InterleavedProcessor",
    "LanguageProcessor",
    "MultimodalConfig",
    "QuestionAnswerCollator",
    "RetrievalRecall",
    "TowerPolicy",
    "Train",
    "VQAAccuracy",
    "__version__",
    "adapter_scale",
    "check_training",
    "describe",
    "export_lora",
    "last_checkpoint",
    "load",
    "matched_modules",
    "parameter_groups",
    "push_to_hub",
    "read_image",
    "save",
    "scale_curve",
]
__all__ += _METHODS


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
