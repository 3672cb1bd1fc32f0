"""Sampling responses from a policy: local generation, stop strings, several turns with an environment."""

from tokenloom.rollout.config import RolloutConfig
from tokenloom.rollout.engine import generate

__all__ = ["RolloutConfig", "generate"]
