"""Which panels a run's page has, and the line under each that says how to read it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Plan", "plans_of"]

_NEAR_LN2 = 0.02


@dataclass(frozen=True)
class Plan:
    """What a panel shows: metric -> name at the line's end (empty: train and held-out are named)."""

    title: str
    caption: str
    lines: Mapping[str, str]
    level: tuple[float, str] | None = None  # a dotted line and its name
    limits: tuple[float, float] | None = None


_DPO_LOSS = Plan(
    "Loss",
    "Starts at ln 2 (dotted) where policy and reference agree, and should fall. "
    "Held-out rising while train falls: the pairs are being learnt by heart.",
    {"loss": ""},
    level=(math.log(2), "ln 2"),
)
_OTHER_LOSS = Plan(
    "Loss",
    "Should fall and level off. Held-out rising while train falls: the rows are being learnt by heart.",
    {"loss": ""},
)
_IMPLICIT_REWARDS = Plan(
    "Implicit rewards",
    "What the loss compares; for DPO beta times the log-ratio to the reference. Their distance is what is learnt; "
    "both falling together is likelihood displacement.",
    {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    level=(0.0, ""),
)
_SCORES = Plan(
    "Scores",
    "Logits of the best and the worst completion of a row. Only their distance is learnt: "
    "where zero lies is set at the end.",
    {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
)
_PPO_LOSS = Plan(
    "Loss",
    "Policy and value loss, mean over an update's steps. Each update has samples of its own, "
    "so its height says little: look at reward and KL.",
    {"loss": ""},
)
_REWARDED = (
    Plan(
        "Reward",
        "What the reward says of fresh samples. Should climb; where it climbs and the samples get worse, "
        "the reward is being gamed.",
        {"reward": ""},
    ),
    Plan(
        "KL to the reference",
        "Nats a sample, estimated on the samples: how far the policy has moved, the price of the reward above.",
        {"kl": ""},
        level=(0.0, ""),
    ),
    Plan(
        "Price of KL",
        "Normalized reward that a nat costs; moves only where a target KL is set.",
        {"kl_coef": ""},
    ),
    Plan(
        "Entropy",
        "Nats a token, of the policy where it samples. A fall to 0 means that samples no longer differ.",
        {"entropy": ""},
    ),
    Plan(
        "Clipped tokens",
        "Share of tokens whose ratio, or value, was beyond the clip. Above about 0.3: lower the learning rate.",
        {"clip_fraction": "policy", "value_clip_fraction": "value"},
    ),
    Plan(
        "Explained variance",
        "Of the returns by the value model before the update: 1 is perfect, 0 no better than a constant (dotted).",
        {"explained_variance": ""},
        level=(0.0, "constant"),
    ),
    Plan("Samples that end", "Share that ends by itself within the length limit.", {"finished": ""}, limits=(0.0, 1.0)),
)
_PLANS = (
    Plan(
        "Accuracy",
        "Share of pairs (or rated or ranked rows) that the rewards order rightly. Dotted: a coin. "
        "Train at 1 with held-out falling: stop earlier.",
        {"rewards/accuracies": ""},
        level=(0.5, "chance"),
        limits=(0.0, 1.0),
    ),
    Plan(
        "Calibration error",
        "How far predicted probabilities are from the observed shares, mean over pairs. "
        "Rising while accuracy stands still: confidence alone is growing.",
        {"calibration_error": ""},
        level=(0.0, ""),
    ),
    Plan(
        "Longer completions",
        "Share of pairs whose longer completion scores higher, beside the share where it is the better one. "
        "Far above: length is being rewarded.",
        {"length/longer_preferred": "scored", "length/longer_chosen": "better"},
        level=(0.5, ""),
        limits=(0.0, 1.0),
    ),
    Plan(
        "Correlation with length",
        "Of score difference and length difference within a prompt, -1 to 1.",
        {"length/correlation": ""},
        level=(0.0, ""),
    ),
    Plan(
        "Reward margin",
        "Chosen minus rejected reward: grows as the model tells them apart. Growth without "
        "better held-out accuracy is only confidence.",
        {"rewards/margins": ""},
        level=(0.0, ""),
    ),
    Plan(
        "KL to the reference",
        "Nats a completion: how far the policy has moved, the price of the gain above. "
        "A steep climb late in the run calls for a larger beta or fewer steps.",
        {"kl": ""},
        level=(0.0, ""),
    ),
    Plan(
        "Log-probabilities",
        "Summed over a completion, in nats. Rejected should fall away from chosen; "
        "chosen falling as well means that probability goes to texts in neither.",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
    Plan(
        "Log-probability",
        "Summed over a completion, in nats: should rise towards 0.",
        {"logps/completion": ""},
    ),
    Plan(
        "Lengths of chosen and rejected",
        "Scored tokens a completion in the data. A steady gap means that length itself is being rewarded.",
        {"lengths/chosen": "chosen", "lengths/rejected": "rejected"},
    ),
    Plan("Length", "Scored tokens a completion in the data.", {"lengths/completion": ""}),
    Plan(
        "Length of samples",
        "Tokens the policy writes. A steady climb means that length itself is being rewarded.",
        {"lengths/sampled": ""},
    ),
    Plan(
        "Importance weight",
        "How hard the gradient still pulls; for DPO the mean of sigmoid(\N{MINUS SIGN}margin), from 0.5 on. "
        "Near 0 there is little left to learn.",
        {"importance_weight": ""},
    ),
    Plan("Learning rate", "The schedule as it was run.", {"lr": ""}),
    Plan(
        "Gradient norm",
        "Before clipping. Single spikes are clipped; a lasting rise calls for a lower learning rate.",
        {"grad_norm": ""},
    ),
    Plan(
        "Throughput",
        "Tokens a second, of training steps alone. Should be level; dips are another program's work or very long rows.",
        {"tokens_per_second": ""},
    ),
)
_TOLD_ELSEWHERE = {
    *("step", "split", "pairs", "rows", "prompts", "peak_memory_bytes", "updates", "ratio/first", "ratio/sampled"),
    *("pairs_per_second", "rows_per_second", "prompts_per_second"),
    *("accuracy", "accuracy/low", "accuracy/high"),  # the outcome says them
}


def plans_of(names: set[str], recipe: str, *, first_loss: float) -> list[Plan]:
    """The panels of a recipe, in their order, and a plain one for every other metric in `names`.

    Args:
        first_loss: At step 0: DPO's is ln 2 there.
    """
    planned = _of_recipe(names, recipe, first_loss)
    others = sorted(names - {name for plan in planned for name in plan.lines} - _TOLD_ELSEWHERE)
    return [*planned, *(Plan(name, "Logged under this name.", {name: ""}) for name in others)]


def _of_recipe(names: set[str], recipe: str, first_loss: float) -> list[Plan]:
    if recipe == "ppo":
        return [*_REWARDED, _PPO_LOSS, *(plan for plan in _PLANS if "kl" not in plan.lines)]
    accuracy, *rest = _PLANS
    if recipe == "reward":
        return [_OTHER_LOSS, accuracy, _SCORES, *rest]
    is_dpo = "rewards/margins" in names and abs(first_loss - math.log(2)) < _NEAR_LN2
    return [_DPO_LOSS if is_dpo else _OTHER_LOSS, accuracy, _IMPLICIT_REWARDS, *rest]
