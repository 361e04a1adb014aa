"""Collators and processors: dataset rows with images and text to the batches that vision-language models take.

They read the dataset's own columns, which `Trainer` would drop: `TrainingArguments(remove_unused_columns=False)`.
"""

from .collators import ImageTextCollator, QuestionAnswerCollator
from .finite import FiniteBatches
from .language_processor import LanguageProcessor
from .switches import evaluating, without_loss

__all__ = [
    "FiniteBatches",
    "ImageTextCollator",
    "LanguageProcessor",
    "QuestionAnswerCollator",
    "evaluating",
    "without_loss",
]
