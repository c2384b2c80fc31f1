"""Rewards as functions: a number for each completion of a prompt, from wherever it comes."""

from prefopt.rewards.open import open_reward
from prefopt.rewards.reward import Reward

__all__ = ["Reward", "open_reward"]
