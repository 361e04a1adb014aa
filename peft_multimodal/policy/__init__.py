"""One policy for all towers of a model: frozen, trained as a whole, or adapted, each at its own learning rate."""

from .config import TowerPolicy, Train
from .tuner import TowerPolicyModel

__all__ = ["TowerPolicy", "TowerPolicyModel", "Train"]
