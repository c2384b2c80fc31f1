"""Every objective, importable and pure: tensors by keyword in, a sum and a count out."""

from prefopt.losses.anchored import apo_down, apo_zero, bco_pair, nca, sppo_hard, sppo_soft
from prefopt.losses.divergence import Divergence, f_dpo
from prefopt.losses.lengths import ld_dpo, length_normalized_dpo, r_dpo
from prefopt.losses.likelihood import negative_log_likelihood, sequence_mean_nll, unlikelihood
from prefopt.losses.margins import discopop, exo, hinge, ipo, ipo_sum
from prefopt.losses.preference import dpo, robust_dpo
from prefopt.losses.ranked import plackett_luce
from prefopt.losses.reward import reward_ranking
from prefopt.losses.total import LossTotal, weighted_sum
from prefopt.losses.transport import aot, aot_unpaired
from prefopt.losses.unpaired import bco, kto, kto_kl
from prefopt.losses.unreferenced import alpha_po, cpo, orpo, simpo
from prefopt.losses.weighting import wpo_weights

__all__ = [
    "Divergence",
    "LossTotal",
    "alpha_po",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco",
    "bco_pair",
    "cpo",
    "discopop",
    "dpo",
    "exo",
    "f_dpo",
    "hinge",
    "ipo",
    "ipo_sum",
    "kto",
    "kto_kl",
    "ld_dpo",
    "length_normalized_dpo",
    "nca",
    "negative_log_likelihood",
    "orpo",
    "plackett_luce",
    "r_dpo",
    "reward_ranking",
    "robust_dpo",
    "sequence_mean_nll",
    "simpo",
    "sppo_hard",
    "sppo_soft",
    "unlikelihood",
    "weighted_sum",
    "wpo_weights",
]
