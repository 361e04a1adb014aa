"""The methods, one file each. Importing this package registers them in PEFT."""

from .aurora_mode_approx import AuroraModeApproxConfig, AuroraModeApproxModel

__all__ = ["AuroraModeApproxConfig", "AuroraModeApproxModel"]
