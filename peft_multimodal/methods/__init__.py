"""The methods, one file each. Importing this package registers them in PEFT."""

from .aurora_mode_approx import AuroraModeApproxConfig, AuroraModeApproxModel
from .cross_lingual_adapter import CrossLingualAdapterConfig, CrossLingualAdapterModel
from .hard_sample_domain_adapter import HardSampleDomainAdapterConfig, HardSampleDomainAdapterModel

__all__ = [
    "AuroraModeApproxConfig",
    "AuroraModeApproxModel",
    "CrossLingualAdapterConfig",
    "CrossLingualAdapterModel",
    "HardSampleDomainAdapterConfig",
    "HardSampleDomainAdapterModel",
]
