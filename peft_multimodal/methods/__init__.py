"""The methods, one file each. Importing this package registers them in PEFT."""

from .aurora_mode_approx import AuroraModeApproxConfig, AuroraModeApproxModel
from .cross_lingual_adapter import CrossLingualAdapterConfig, CrossLingualAdapterModel
from .structured_prompt import StructuredPromptConfig, StructuredPromptModel

__all__ = [
    "AuroraModeApproxConfig",
    "AuroraModeApproxModel",
    "CrossLingualAdapterConfig",
    "CrossLingualAdapterModel",
    "StructuredPromptConfig",
    "StructuredPromptModel",
]
