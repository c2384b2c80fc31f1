"""Training health: plain sentences about what the metrics mean, said while it happens."""

import math
from collections import deque
from dataclasses import dataclass, field

__all__ = ["Health", "HealthWarning"]

# Reference and policy are the same at step 0; rounding of bfloat16 sums stays below this (nats).
_STEP0_TOLERANCE = 0.02
# A fall of both log-probabilities is displacement once it exceeds this many nats a completion token.
_DISPLACEMENT = 0.05
# Averages over this many training steps smooth single batches.
_WINDOW = 8
# Nats of KL per completion token; at one nat, tokens the policy writes are e times rarer in the reference.
_KL_PER_TOKEN = 1.0
# Held-out accuracy must fall by more than this from its best before it is called over-fitting.
_ACCURACY_FALL = 0.03
# Held-out loss must rise by more than this share above its best.
_LOSS_RISE = 0.02
_LENGTH_DRIFT = 1.5
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
    """

    beta: float | None = None
    _said: set[str] = field(default_factory=set)
    _first: dict[str, dict[str, float]] = field(default_factory=dict)
    _best: dict[str, float] = field(default_factory=dict)
    _recent: dict[str, deque[float]] = field(default_factory=dict)

    def observe(self, step: int, split: str, metrics: dict[str, float]) -> list[HealthWarning]:
        """Take one line of metrics.jsonl; returns what there is to say about it."""
        first = self._first.setdefault(split, dict(metrics))
        if split == "train":
            for name, value in metrics.items():
                self._recent.setdefault(name, deque(maxlen=_WINDOW)).append(value)
            found = [*self._step0(step, metrics), *self._displacement()]
        else:
            found = [
                *self._step0(step, metrics),
                *self._overfit(metrics),
                *self._kl(metrics),
                *self._lengths(first, metrics),
            ]
            for name in ("rewards/accuracies", "loss"):
                if name in metrics:
                    better = max if name != "loss" else min
                    self._best[name] = better(self._best.get(name, metrics[name]), metrics[name])
        return self._once(step, found)

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

    def _step0(self, step: int, metrics: dict[str, float]) -> list[tuple[str, str]]:
        if self.beta is None or step != 0 or abs(metrics["loss"] - math.log(2)) <= _STEP0_TOLERANCE:
            return []
        return [
            (
                "step0_loss",
                f"the loss before any update is {metrics['loss']:.4f}, not ln 2 = 0.6931: policy and reference are "
                "different models; check --model and --reference unless you mean that.",
            )
        ]

    def _displacement(self) -> list[tuple[str, str]]:
        """rewards / beta is log pi - log pi_ref of the very same rows, so batches need not be alike."""
        for side in ("chosen", "rejected"):
            reward, tokens = self._mean(f"rewards/{side}"), self._mean(f"lengths/{side}")
            if self.beta is None or reward is None or tokens is None or reward / self.beta > -_DISPLACEMENT * tokens:
                return []
        return [
            (
                "likelihood_displacement",
                "the log-probabilities of chosen AND rejected completions are falling: common in DPO while the margin "
                "grows, but samples may decay; lower --lr, raise --beta, or stop earlier if they do.",
            )
        ]

    def _overfit(self, metrics: dict[str, float]) -> list[tuple[str, str]]:
        train, held = self._mean("rewards/accuracies"), metrics.get("rewards/accuracies")
        if held is not None:
            best = self._best.get("rewards/accuracies", held)
            if train is None or train < 0.99 or held >= best - _ACCURACY_FALL:
                return []
            seen = f"accuracy is {train:.0%} on training pairs and fell from {best:.0%} to {held:.0%} on held-out pairs"
        else:
            best, now = self._best.get("loss", math.inf), metrics["loss"]
            if now <= best * (1 + _LOSS_RISE):
                return []
            seen = f"the held-out loss rose from {best:.3f} to {now:.3f}"
        return [("overfit", f"{seen}: the model learns rows by heart; use fewer epochs, a lower --lr, or more data.")]

    def _kl(self, metrics: dict[str, float]) -> list[tuple[str, str]]:
        lengths = [metrics[n] for n in ("lengths/chosen", "lengths/rejected") if n in metrics]
        if "kl" not in metrics or not lengths:
            return []
        per_token = metrics["kl"] / (sum(lengths) / len(lengths))
        if per_token <= _KL_PER_TOKEN:
            return []
        return [
            (
                "kl_runaway",
                f"the KL to the reference is {metrics['kl']:.1f} nats a completion ({per_token:.2f} a token): the "
                "policy has left the reference far behind; raise --beta, lower --lr, or stop earlier.",
            )
        ]

    def _lengths(self, first: dict[str, float], metrics: dict[str, float]) -> list[tuple[str, str]]:
        start, now = first.get("lengths/sampled"), metrics.get("lengths/sampled")
        if not start or now is None or now <= _LENGTH_DRIFT * start:
            return []
        return [
            (
                "length_drift",
                f"sampled completions grew from {start:.0f} to {now:.0f} tokens: if chosen completions are longer than "
                "rejected ones in your data, length may be what is learned; balance lengths or raise --beta.",
            )
        ]
