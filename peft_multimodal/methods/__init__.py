"""The methods, one file each. Importing this package registers them in PEFT."""

from ..nn.media import MediaCache
from .aurora_mode_approx import AuroraModeApproxConfig, AuroraModeApproxModel
from .cross_lingual_adapter import CrossLingualAdapterConfig, CrossLingualAdapterModel
from .gated_xattn import GatedXAttnConfig, GatedXAttnModel
from .hard_sample_domain_adapter import HardSampleDomainAdapterConfig, HardSampleDomainAdapterModel
from .structured_prompt import StructuredPromptConfig, StructuredPromptModel
from .uni_adapter import UniAdapterConfig, UniAdapterModel

__all__ = [
    "AuroraModeApproxConfig",
    "AuroraModeApproxModel",
    "CrossLingualAdapterConfig",
    "CrossLingualAdapterModel",
    "GatedXAttnConfig",
    "GatedXAttnModel",
    "HardSampleDomainAdapterConfig",
    "HardSampleDomainAdapterModel",
    "MediaCache",
    "StructuredPromptConfig",
    "StructuredPromptModel",
    "UniAdapterConfig",
    "UniAdapterModel",
]
