"""One frozen model per command: the single source of flags, YAML keys, bounds and help.

A field's description is the sentence `--help` prints. Nothing edits a configuration once it is
parsed; the resolved copy is saved in the run folder.
"""

from prefopt.config.base import DataConfig, RowsConfig, TrainConfig
from prefopt.config.evaluate import BestOfConfig
from prefopt.config.recipes import DPOConfig, PPOConfig, SFTConfig
from prefopt.config.tools import (
    ChatConfig,
    CheckConfig,
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
    "MergeConfig",
    "PPOConfig",
    "QuickstartConfig",
    "ResumeConfig",
    "RowsConfig",
    "SFTConfig",
    "ScoreConfig",
    "TrainConfig",
]
