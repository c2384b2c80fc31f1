"""Training health: plain sentences about what the metrics mean, said while it happens.

Pure: numbers in, sentences out. Metrics that are missing are not judged, so one class serves
every recipe.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Health", "HealthWarning"]

# Reference and policy are the same at step 0; rounding of bfloat16 sums stays below this (nats).
_STEP0_TOLERANCE = 0.02
# A fall of both log-probabilities is displacement once it exceeds this many nats a completion token:
# a twentieth of every token's probability, more than a run gains or loses by chance.
_DISPLACEMENT = 0.05
# Averages over this many training steps smooth single batches.
_WINDOW = 8
# Nats of KL per completion token; at half a nat the reference's perplexity on what the policy prefers is
# 1.6 times the policy's own, several times what published DPO and RLHF runs spend.
_KL_PER_TOKEN = 0.5
# Training pairs count as learnt by heart from here on.
_LEARNT = 0.99
# Held-out accuracy must fall by more than this from its best before it is called over-fitting ...
_ACCURACY_FALL = 0.03
# ... and by at least as many pairs: in a small held-out set one pair alone is more than that share.
_PAIRS_FALL = 2
# Held-out loss must rise by more than this share above its best. The same rows every time: no sampling noise.
_LOSS_RISE = 0.02
# The sampler decodes token by token, which rounds otherwise than a whole forward pass does.
_DECODING = 10
# Sampled completions may grow by half before it is called drift: a few samples vary by that much less.
_LENGTH_DRIFT = 1.5
# Up to this share of cut rows is the usual long tail.
_MANY_CUT = 0.05


@dataclass(frozen=True)
class HealthWarning:
    """One sentence for people: what is seen, and what to do."""

    kind: str
    step: int
    sentence: str


@dataclass
class Health:
    """Watches a run's metrics; each kind of warning is given once.

    Attributes:
        beta: DPO's, whose loss is ln 2 before any update; None for other recipes.
        ratio_tolerance: How far PPO's first ratios may be from 1: what the arithmetic rounds.
    """

    beta: float | None = None
    ratio_tolerance: float = 1e-3
    _said: set[str] = field(default_factory=set)
    _first: dict[str, dict[str, float | int]] = field(default_factory=dict)
    _recent: dict[str, deque[float | int]] = field(default_factory=dict)
    _best_accuracy: float = -math.inf
    _best_loss: float = math.inf
    _train_loss_at_best: float | None = None

    def observe(self, step: int, split: str, metrics: Mapping[str, float | int]) -> list[HealthWarning]:
        """Take one line of metrics.jsonl; returns what there is to say about it."""
        self._first.setdefault(split, dict(metrics))
        found = self._step0(step, metrics)
        if split == "train":
            for name, value in metrics.items():
                self._recent.setdefault(name, deque(maxlen=_WINDOW)).append(value)
            found += [*self._displacement(), *self._first_ratio(metrics)]
        else:
            found += [*self._overfit(metrics), *self._kl(metrics), *self._lengths(metrics)]
            self._keep_best(metrics)
        return self._once(step, found)

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take the lines of metrics.jsonl that a resumed run has already; what they say was said then."""
        for line in lines:
            metrics = {name: value for name, value in line.items() if name not in ("step", "split")}
            self.observe(line["step"], line["split"], metrics)

    def note_cut(self, cut: int, rows: int) -> list[HealthWarning]:
        """Take how many rows lost tokens to the length limit."""
        if not rows or cut / rows <= _MANY_CUT:
            return []
        sentence = (
            f"{cut:,} of {rows:,} rows ({cut / rows:.0%}) were cut to fit max_length, and a cut completion never "
            "learns to end: raise --max-length, or leave those rows out."
        )
        return self._once(0, [("many_cut", sentence)])

    def _once(self, step: int, found: list[tuple[str, str]]) -> list[HealthWarning]:
        fresh = [HealthWarning(kind, step, sentence) for kind, sentence in found if kind not in self._said]
        self._said |= {warning.kind for warning in fresh}
        return fresh

    def _mean(self, name: str) -> float | None:
        values = self._recent.get(name)
        return sum(values) / len(values) if values and len(values) == _WINDOW else None

    def _keep_best(self, metrics: Mapping[str, float | int]) -> None:
        self._best_accuracy = max(self._best_accuracy, metrics.get("rewards/accuracies", -math.inf))
        if metrics.get("loss", math.inf) <= self._best_loss:
            self._best_loss = metrics.get("loss", math.inf)
            self._train_loss_at_best = self._mean("loss")

    def _step0(self, step: int, metrics: Mapping[str, float | int]) -> list[tuple[str, str]]:
        loss = metrics.get("loss")
        if self.beta is None or step != 0 or loss is None or abs(loss - math.log(2)) <= _STEP0_TOLERANCE:
            return []
        # Weighted pairs move the loss, too; then all rewards are zero nevertheless.
        rewards = [metrics.get(f"rewards/{side}") for side in ("chosen", "rejected")]
        if all(r is not None and abs(r) <= _STEP0_TOLERANCE for r in rewards):
            return []
        return [
            (
                "step0_loss",
                f"the loss before any update is {loss:.4f}, not ln 2 = 0.6931: policy and reference are "
                "different models; check --model and --reference unless you mean that.",
            )
        ]

    def _displacement(self) -> list[tuple[str, str]]:
        """rewards / beta is log pi - log pi_ref of the very same rows, so batches need not be alike."""
        fallen = {}
        for side in ("chosen", "rejected"):
            reward, tokens = self._mean(f"rewards/{side}"), self._mean(f"lengths/{side}")
            if not self.beta or reward is None or not tokens:
                return []
            # A reference of its own is not where the policy started.
            start = self._first["train"].get(f"rewards/{side}", 0.0)
            fallen[side] = (start - reward) / self.beta / tokens
        if min(fallen.values()) <= _DISPLACEMENT:
            return []
        return [
            (
                "likelihood_displacement",
                "the log-probabilities of both chosen and rejected completions have fallen, by "
                f"{fallen['chosen']:.2f} and {fallen['rejected']:.2f} nats a token: common in DPO while the margin "
                "grows, but read the samples, and if they decay lower --lr, raise --beta, or run `prefopt sft` on "
                "the chosen completions first.",
            )
        ]

    def _overfit(self, metrics: Mapping[str, float | int]) -> list[tuple[str, str]]:
        seen = self._accuracies_part(metrics) if "rewards/accuracies" in metrics else self._losses_part(metrics)
        if seen is None:
            return []
        return [("overfit", f"{seen}: the model learns rows by heart; use fewer epochs, a lower --lr, or more data.")]

    def _accuracies_part(self, metrics: Mapping[str, float | int]) -> str | None:
        """Preferences: training pairs are all ranked right while held-out ones get worse."""
        train, held = self._mean("rewards/accuracies"), metrics["rewards/accuracies"]
        if train is None or train < _LEARNT:
            return None
        fall = self._best_accuracy - held
        if fall > _ACCURACY_FALL and fall * metrics.get("pairs", metrics.get("rows", math.inf)) > _PAIRS_FALL - 0.5:
            return (
                f"accuracy is {train:.0%} on training pairs and fell from {self._best_accuracy:.0%} to {held:.0%} "
                "on held-out pairs"
            )
        loss = metrics.get("loss", -math.inf)
        if loss > self._best_loss * (1 + _LOSS_RISE):
            return (
                f"accuracy is {train:.0%} on training pairs while the held-out loss rose from {self._best_loss:.3f} "
                f"to {loss:.3f}"
            )
        return None

    def _losses_part(self, metrics: Mapping[str, float | int]) -> str | None:
        """Likelihoods: training loss still falls while held-out loss rises."""
        loss, train = metrics.get("loss", -math.inf), self._mean("loss")
        then = self._train_loss_at_best or self._first.get("train", {}).get("loss")
        if train is None or then is None or train >= then or loss <= self._best_loss * (1 + _LOSS_RISE):
            return None
        return f"the held-out loss rose from {self._best_loss:.3f} to {loss:.3f} while the training loss fell"

    def _first_ratio(self, metrics: Mapping[str, float | int]) -> list[tuple[str, str]]:
        """1 before any step: of the first minibatch to the scores of the rollout, and of these to the sampler."""
        first, sampled = metrics.get("ratio/first", 1.0), metrics.get("ratio/sampled", 1.0)
        if abs(first - 1) <= self.ratio_tolerance and abs(sampled - 1) <= _DECODING * self.ratio_tolerance:
            return []
        return [
            (
                "first_ratio",
                f"before any step on them, samples are probable by up to {max(first, sampled):.3g} times what they "
                "were drawn with, not 1: what samples is not what is trained, so these updates are not PPO's; try "
                "--dtype float32, and please report it if that does not help.",
            )
        ]

    def _kl(self, metrics: Mapping[str, float | int]) -> list[tuple[str, str]]:
        sampled = "reward" in metrics
        names = ("lengths/sampled",) if sampled else ("lengths/chosen", "lengths/rejected", "lengths/completion")
        lengths = [metrics[n] for n in names if metrics.get(n)]
        if "kl" not in metrics or not lengths:
            return []
        per_token = metrics["kl"] / (sum(lengths) / len(lengths))
        if per_token <= _KL_PER_TOKEN:
            return []
        return [
            (
                "kl_runaway",
                f"the KL to the reference is {metrics['kl']:.1f} nats a completion ({per_token:.2f} a token): the "
                f"policy has left the reference far behind; raise --{'kl-coef' if sampled else 'beta'}, lower --lr, or "
                "stop earlier.",
            )
        ]

    def _lengths(self, metrics: Mapping[str, float | int]) -> list[tuple[str, str]]:
        start, now = self._first["eval"].get("lengths/sampled"), metrics.get("lengths/sampled")
        if not start or now is None or now <= _LENGTH_DRIFT * start:
            return []
        grew = f"sampled completions grew from {start:.0f} to {now:.0f} tokens"
        if "reward" in metrics:
            return [
                ("length_drift", f"{grew}: if the reward likes length, length is what is learned; read the samples.")
            ]
        return [
            (
                "length_drift",
                f"{grew}: if chosen completions are longer than rejected ones in your data, length may be what is "
                "learned; balance lengths or raise --beta.",
            )
        ]
