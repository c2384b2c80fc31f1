"""Every objective, importable and pure: tensors by keyword in, a sum and a count out."""

from prefopt.losses.likelihood import negative_log_likelihood
from prefopt.losses.preference import dpo
from prefopt.losses.total import LossTotal

__all__ = ["LossTotal", "dpo", "negative_log_likelihood"]
