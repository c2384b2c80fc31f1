"""Every objective by name, with its own parameters: typed, bounded, at its paper's default. Needs no torch.

The function of the same name in `prefopt.losses` has the equation, and the sources of the defaults.
"""

import difflib
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = ["MOVABLE", "OBJECTIVES", "Rows", "Term", "names_taking", "needs_beta", "terms_of"]

Rows = Literal["pairs", "ratings", "rankings"]

_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


class Term(BaseModel):
    """One term of the loss.

    Attributes:
        rows: What it is an objective over.
        weighted: Whether a row may have a weight.
        weight: What its loss is multiplied by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    rows: ClassVar[Rows] = "pairs"
    weighted: ClassVar[bool] = True

    name: str
    weight: _Positive = 1.0

    @property
    def parameters(self) -> dict[str, Any]:
        """What the function of that name is given besides tensors."""
        return {k: v for k, v in self.model_dump(exclude={"name", "weight"}).items() if v is not None}


class DPO(Term):
    """Direct preference optimization; with label smoothing, conservative DPO."""

    name: Literal["dpo"] = "dpo"
    beta: _Positive
    label_smoothing: _Smoothing = 0.0


class RobustDPO(Term):
    """DPO for labels of which a known share is wrong."""

    name: Literal["robust_dpo"] = "robust_dpo"
    beta: _Positive
    label_smoothing: _Smoothing = 0.1


class IPO(Term):
    """A margin of fixed size, per token or per completion."""

    name: Literal["ipo", "ipo_sum"] = "ipo"
    beta: _Positive


class Hinge(Term):
    """SLiC."""

    name: Literal["hinge"] = "hinge"
    beta: _Positive


class EXO(Term):
    """Reverse KL to the labels."""

    name: Literal["exo"] = "exo"
    beta: _Positive
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3


class Anchored(Term):
    """Losses that also hold each completion's own likelihood."""

    name: Literal["apo_zero", "apo_down", "bco_pair"] = "apo_zero"
    beta: _Positive


class NCA(Term):
    """Noise contrastive alignment."""

    name: Literal["nca"] = "nca"
    beta: _Positive


class SPPO(Term):
    """Self-play: log-ratios towards fixed targets."""

    name: Literal["sppo_hard", "sppo_soft"] = "sppo_hard"
    beta: _Positive


class AOT(Term):
    """Distributions of rewards, not pairs."""

    weighted: ClassVar[bool] = False
    name: Literal["aot", "aot_unpaired"] = "aot"
    beta: _Positive
    label_smoothing: _Smoothing = 0.0


class DiscoPOP(Term):
    """The loss that a search found."""

    name: Literal["discopop"] = "discopop"
    beta: _Positive
    tau: Annotated[float, Field(gt=0, le=1)] = 0.05


class FDPO(Term):
    """DPO under another divergence than the reverse KL."""

    name: Literal["f_dpo"] = "f_dpo"
    beta: _Positive
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "jensen_shannon"
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    label_smoothing: _Smoothing = 0.0

    @model_validator(mode="after")
    def _alpha_with_its_divergence(self) -> "FDPO":
        if (self.divergence == "alpha") != (self.alpha is not None):
            raise ValueError("alpha goes with divergence alpha, and the other way round")
        return self


class LengthNormalizedDPO(Term):
    """Rewards per token."""

    name: Literal["length_normalized_dpo"] = "length_normalized_dpo"
    beta: _Positive
    label_smoothing: _Smoothing = 0.0


class RDPO(Term):
    """A price on length."""

    name: Literal["r_dpo"] = "r_dpo"
    beta: _Positive
    alpha: _NotNegative = 0.01
    label_smoothing: _Smoothing = 0.0


class LDDPO(Term):
    """The longer completion's surplus counts less."""

    name: Literal["ld_dpo"] = "ld_dpo"
    beta: _Positive
    alpha: _Share = 0.5
    label_smoothing: _Smoothing = 0.0


class ORPO(Term):
    """Likelihood and odds ratio, no reference."""

    name: Literal["orpo"] = "orpo"
    beta: _Positive = 0.1
    label_smoothing: _Smoothing = 0.0


class SimPO(Term):
    """Token means with a target margin, no reference."""

    name: Literal["simpo"] = "simpo"
    beta: _Positive = 2.0
    gamma: _NotNegative = 1.0
    label_smoothing: _Smoothing = 0.0


class AlphaPO(Term):
    """SimPO with a reward of another shape."""

    name: Literal["alpha_po"] = "alpha_po"
    beta: _Positive = 2.5
    gamma: _NotNegative = 0.25
    alpha: Annotated[float, Field(ge=-10, le=10)] = 0.25
    label_smoothing: _Smoothing = 0.0


class CPO(Term):
    """DPO without its reference, and likelihood."""

    name: Literal["cpo"] = "cpo"
    beta: _Positive = 0.1
    nll_weight: _NotNegative = 1.0
    label_smoothing: _Smoothing = 0.0


class KTO(Term):
    """Thumbs up and down, each completion by itself."""

    rows: ClassVar[Rows] = "ratings"
    name: Literal["kto", "bco"] = "kto"
    beta: _Positive
    desirable_weight: _NotNegative = 1.0
    undesirable_weight: _NotNegative = 1.0


class PlackettLuce(Term):
    """DPO over whole rankings."""

    rows: ClassVar[Rows] = "rankings"
    name: Literal["plackett_luce"] = "plackett_luce"
    beta: _Positive


class Unlikelihood(Term):
    """A baseline of the DPO paper."""

    name: Literal["unlikelihood"] = "unlikelihood"
    alpha: _Share = 0.5


class SFT(Term):
    """Mean log-likelihood of a token of the chosen completion, every pair alike: the term of RPO and MPO."""

    name: Literal["sft"] = "sft"


_KINDS: tuple[type[Term], ...] = (
    *(DPO, RobustDPO, IPO, Hinge, EXO, Anchored, NCA, SPPO, AOT, DiscoPOP, FDPO, LengthNormalizedDPO, RDPO, LDDPO),
    *(ORPO, SimPO, AlphaPO, CPO, Unlikelihood, SFT, KTO, PlackettLuce),
)
# Every name, and the class that has its parameters.
OBJECTIVES: dict[str, type[Term]] = {
    name: kind for kind in _KINDS for name in get_args(kind.model_fields["name"].annotation)
}


def needs_beta(term: dict[str, Any]) -> bool:
    """Whether the objective has a beta without a default, and `term` none of its own.

    Where there is a reference beta says how far from it the policy may go, which nobody else can know.
    """
    kind = OBJECTIVES.get(str(term.get("name")))
    field = kind.model_fields.get("beta") if kind else None
    return field is not None and field.is_required() and "beta" not in term


# Over pairs and their whole sums under a reference: these can follow one that moves.
MOVABLE = tuple(
    name
    for name, kind in OBJECTIVES.items()
    if kind.rows == "pairs" and needs_beta({"name": name}) and name != "ld_dpo"
)


def names_taking(parameter: str) -> list[str]:
    """Objectives that have this parameter."""
    return [name for name, kind in OBJECTIVES.items() if parameter in kind.model_fields]


def terms_of(loss: tuple[dict[str, Any], ...], common: dict[str, Any]) -> tuple[Term, ...]:
    """The terms of a loss, each with its parameters.

    Args:
        loss: `name`, perhaps `weight`, and parameters of its own.
        common: Parameters given for the whole loss: every term that has one takes it, unless it has its own.

    Raises:
        ValueError: an unknown name, a parameter out of bounds or one that no term takes; a sentence for people.
    """
    for term in loss:
        if term.get("name") not in OBJECTIVES:
            near = difflib.get_close_matches(str(term.get("name")), OBJECTIVES, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(OBJECTIVES)}"
            raise ValueError(f"loss has no objective called {term.get('name')!r}{hint}")
    names = [str(term["name"]) for term in loss]
    if len({OBJECTIVES[name].rows for name in names}) > 1:
        over = ", ".join(f"{name} over {OBJECTIVES[name].rows}" for name in names)
        raise ValueError(f"loss adds objectives over different rows: {over}")
    if len(set(names)) < len(names):
        raise ValueError(f"loss names an objective twice: {', '.join(names)}")
    for parameter in common:
        if not set(names) & set(names_taking(parameter)):
            raise ValueError(_without_effect(parameter, names))
    return tuple(_term(term, common) for term in loss)


def _term(given: dict[str, Any], common: dict[str, Any]) -> Term:
    kind = OBJECTIVES[str(given["name"])]
    for parameter in given:
        if parameter not in kind.model_fields:
            raise ValueError(_without_effect(parameter, [str(given["name"])]))
    taken = {k: v for k, v in common.items() if k in kind.model_fields}
    try:
        return kind.model_validate({**taken, **given})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise ValueError(f"loss {given['name']}: {first['msg'].removeprefix('Value error, ')}") from None
        name = str(first["loc"][0])
        shown = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise ValueError(f"loss {given['name']}: {name} is {first['input']!r}, but should be {shown}") from None


def _without_effect(parameter: str, names: list[str]) -> str:
    taking = names_taking(parameter)
    if taking:
        return f"{parameter} does nothing with loss {' + '.join(names)}; it is a parameter of {', '.join(taking)}"
    known = sorted({f for name in names for f in OBJECTIVES[name].model_fields} - {"name", "weight"})
    return f"{parameter} is no parameter of loss {' + '.join(names)}; it has {', '.join(known) or 'none'}"
