"""A causal language model seen as a policy: loading, forward, signals, backward.

Needs `transformers`; importing it here is put off until a model is loaded.
"""

from tokenloom.policy.config import LoraSection, ModelConfig, ValueHeadSection
from tokenloom.policy.interface import PolicyLike
from tokenloom.policy.policy import Policy

__all__ = ["LoraSection", "ModelConfig", "Policy", "PolicyLike", "ValueHeadSection"]
