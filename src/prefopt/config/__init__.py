"""One frozen model per command: the single source of flags, YAML keys, bounds and help.

A field's description is the sentence `--help` prints. Nothing edits a configuration once it is
parsed; the resolved copy is saved in the run folder.
"""

from prefopt.config.base import DataConfig, PolicyConfig, RowsConfig, TrainConfig, UsableRowsConfig
from prefopt.config.evaluate import BestOfConfig
from prefopt.config.frontier import FrontierConfig
from prefopt.config.recipes import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from prefopt.config.tools import (
    ChatConfig,
    CheckConfig,
    FrontierCommand,
    MergeConfig,
    QuickstartConfig,
    ResumeConfig,
    ScoreConfig,
)

__all__ = [
    "BestOfConfig",
    "ChatConfig",
    "CheckConfig",
    "DPOConfig",
    "DataConfig",
    "FrontierCommand",
    "FrontierConfig",
    "MergeConfig",
    "PPOConfig",
    "PolicyConfig",
    "QuickstartConfig",
    "ResumeConfig",
    "RewardConfig",
    "RowsConfig",
    "SFTConfig",
    "ScoreConfig",
    "TrainConfig",
    "UsableRowsConfig",
]
