"""Every objective through `prefopt dpo` itself, on a tiny model."""

import inspect
import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prefopt import losses
from prefopt.config import DPOConfig
from prefopt.data.audit import Audit
from prefopt.data.tokenize import Renderer
from prefopt.errors import ConfigError, DataError
from prefopt.model.load import eos_ids, load_model
from prefopt.moving import MovingReference
from prefopt.objectives import OBJECTIVES
from prefopt.parse import parse_config
from prefopt.preference import inputs_of, needs_reference
from prefopt.recipes.dpo import train
from prefopt.records import Demonstration, Source
from prefopt.thresholds import RewardShift, mismatched
from tiny import completion, group, model_of, save_tiny_model, write_pairs

BETA = {"sppo_hard": 0.001, "sppo_soft": 0.001, "length_normalized_dpo": 5.0}
OPTIONS: dict[str, dict[str, Any]] = {"f_dpo": {"divergence": "alpha", "alpha": 0.5}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 24)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    write(folder / "soft.jsonl", [{**p, "probability": 0.9} for p in pairs])
    ratings = [
        {"prompt": p["prompt"], "completion": p["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, p in enumerate(pairs)
    ]
    write(folder / "ratings.jsonl", ratings)
    extra = [" It is so-so.", " I cannot say"]
    rankings = [
        {"prompt": p["prompt"], "completions": [p["chosen"], *extra[: i % 3], p["rejected"]]}
        for i, p in enumerate(pairs)
    ]
    write(folder / "rankings.jsonl", rankings)
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(inputs: Path, out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[dict[str, Any]]:
    """Metrics of a run of three steps."""
    monkeypatch.setenv("PREFOPT_CACHE", str(cache))
    given = {
        **{"model": str(inputs / "model"), "data": str(inputs / "pairs.jsonl"), "out": str(out), "lr": 1e-2},
        **{"batch_pairs": 8, "max_steps": 3, "eval_share": 0, "samples": 0, "tokens_per_batch": 256, **settings},
    }
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(given))
    train(parse_config(DPOConfig, file, {}))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def scored(cache: Path) -> int:
    """Sequences in the reference cache."""
    if not (cache / "reference.sqlite").exists():
        return 0
    with sqlite3.connect(cache / "reference.sqlite") as db:
        (count,) = db.execute("SELECT count(*) FROM logprobs").fetchone()
    db.close()
    return int(count)


def term(name: str) -> dict[str, Any]:
    own = OPTIONS.get(name, {})
    with_beta = OBJECTIVES[name].model_fields.get("beta")
    return {"name": name, **({"beta": BETA.get(name, 0.1)} if with_beta is not None else {}), **own}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(inputs / f"{'soft' if name == 'sppo_soft' else OBJECTIVES[name].rows}.jsonl")
    lines = run(inputs, tmp_path / "run", tmp_path / "cache", monkeypatch, loss=[term(name)], data=data)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[2]["loss"] < lines[0]["loss"], "three steps at a large rate on the same kind of pairs"
    config = parse_config(DPOConfig, tmp_path / "run" / "config.yaml", {})
    assert bool(scored(tmp_path / "cache")) == needs_reference(config.terms)
    assert needs_reference(config.terms) == (name not in ("orpo", "simpo", "alpha_po", "cpo", "unlikelihood", "sft"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parameters_are_those_of_the_function(name: str) -> None:
    function = getattr(losses, {"sft": "sequence_mean_nll"}.get(name, name))
    wanted = {n: p for n, p in inspect.signature(function).parameters.items() if p.annotation in (float, "float")}
    taken = set(OBJECTIVES[name].model_fields) - {"name", "weight"}
    assert set(wanted) <= taken <= set(inspect.signature(function).parameters)
    made = OBJECTIVES[name].model_validate(term(name))
    assert not inputs_of([made]) & taken


def test_a_sum_is_the_sum_of_its_terms(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    terms = [{"name": "dpo", "beta": 0.1, "weight": 0.8}, {"name": "sft", "weight": 0.2}]
    (first, *_) = run(inputs, tmp_path / "sum", cache, monkeypatch, loss=terms)
    (dpo, *_) = run(inputs, tmp_path / "dpo", cache, monkeypatch, loss="dpo", beta=0.1)
    (sft, *_) = run(inputs, tmp_path / "sft", cache, monkeypatch, loss="sft")
    assert first["loss"] == pytest.approx(0.8 * dpo["loss"] + 0.2 * sft["loss"], rel=1e-6)
    assert first["loss/dpo"] == pytest.approx(dpo["loss"], rel=1e-6)
    assert first["loss/sft"] == pytest.approx(sft["loss"], rel=1e-6)


def test_desensitised_by_nothing_is_dpo(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads and tails of both models add up to the whole; cut off, they are what the shorter one has."""
    cache = tmp_path / "cache"
    dpo = run(inputs, tmp_path / "dpo", cache, monkeypatch, loss="dpo", beta=0.5)
    whole = run(inputs, tmp_path / "ld1", cache, monkeypatch, loss="ld_dpo", beta=0.5, loss_options={"alpha": 1})
    cut = run(inputs, tmp_path / "ld0", cache, monkeypatch, loss="ld_dpo", beta=0.5, loss_options={"alpha": 0})
    assert [line["loss"] for line in whole] == pytest.approx([line["loss"] for line in dpo], rel=1e-4)
    assert cut[2]["loss"] != pytest.approx(dpo[2]["loss"], rel=1e-4)


def test_a_sweep_over_losses_runs_the_reference_once(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    counts = []
    for name in ("dpo", "ipo", "hinge"):
        run(inputs, tmp_path / name, cache, monkeypatch, loss=name, beta=0.1)
        counts.append(scored(cache))
    assert counts[0] > 0 and len(set(counts)) == 1


@pytest.mark.parametrize("name", ["kto", "bco", "plackett_luce", "ld_dpo"])
def test_micro_batches_change_nothing(name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs to a step, such as KTO's reference point, is the same for all its micro-batches."""
    data = str(inputs / f"{OBJECTIVES[name].rows}.jsonl")
    whole, single = (
        run(
            inputs,
            tmp_path / str(budget),
            tmp_path / "cache",
            monkeypatch,
            loss=[term(name)],
            data=data,
            tokens_per_batch=budget,
            eval_share=0.25,
        )
        for budget in (100_000, 64)
    )
    assert len(whole) == len(single) > 3
    for one, other in zip(whole, single, strict=True):
        for key in one.keys() - {"tokens_per_second", "peak_memory_bytes", "split"}:
            if not key.endswith("_per_second"):
                assert other[key] == pytest.approx(one[key], rel=2e-3, abs=2e-3), key
    if name == "kto":
        assert whole[-1]["kl/mismatched"] > 0, "the policy has moved"


def test_a_ranking_of_two_is_dpo(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, through a column of pairs and a column of scores."""
    cache = tmp_path / "cache"
    dpo = run(inputs, tmp_path / "dpo", cache, monkeypatch, loss="dpo", beta=0.1)
    pairs = run(inputs, tmp_path / "pairs", cache, monkeypatch, loss="plackett_luce", beta=0.1)
    rows = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]
    scored_rows = [
        {"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"]], "scores": [1.5, 7]} for r in rows
    ]
    write(tmp_path / "scored.jsonl", scored_rows)
    scores = run(
        inputs,
        tmp_path / "scores",
        cache,
        monkeypatch,
        loss="plackett_luce",
        beta=0.1,
        data=str(tmp_path / "scored.jsonl"),
    )
    assert [m["loss"] for m in dpo] == [m["loss"] for m in pairs] == [m["loss"] for m in scores]
    assert [m["grad_norm"] for m in dpo] == [m["grad_norm"] for m in pairs]


@pytest.mark.parametrize(
    ("loss", "data", "message"),
    [
        ("dpo", "ratings", "loss dpo is over pairs"),
        ("dpo", "rankings", "loss dpo is over pairs"),
        ("kto", "pairs", "loss kto is over ratings"),
        ("plackett_luce", "ratings", "loss plackett_luce is over rankings"),
    ],
)
def test_rows_of_another_kind_are_named_with_the_losses_that_take_them(
    loss: str, data: str, message: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        run(inputs, tmp_path / "run", tmp_path, monkeypatch, loss=loss, beta=0.1, data=str(inputs / f"{data}.jsonl"))
    takers = {"pairs": "--loss dpo", "ratings": "--loss kto or bco", "rankings": "--loss plackett_luce"}
    assert takers[data] in str(caught.value.todo)
    assert not (tmp_path / "run").exists()


def test_a_judges_probability_softens_the_label(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    rows = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]
    runs = {}
    for p in (1, 0.7, 0.5):
        write(tmp_path / f"{p}.jsonl", [{**row, "probability": p} for row in rows])
        runs[p] = run(
            inputs, tmp_path / f"run-{p}", cache, monkeypatch, loss="dpo", beta=0.1, data=str(tmp_path / f"{p}.jsonl")
        )
    hard = run(inputs, tmp_path / "hard", cache, monkeypatch, loss="dpo", beta=0.1)
    smooth = run(inputs, tmp_path / "smooth", cache, monkeypatch, loss="dpo", beta=0.1, label_smoothing=0.3)
    assert [m["loss"] for m in runs[1]] == [m["loss"] for m in hard]
    # p = 0.7 is label smoothing by 0.3; at p = 0.5 equal models have nothing to learn.
    assert [m["loss"] for m in runs[0.7]] == pytest.approx([m["loss"] for m in smooth], rel=1e-5)
    assert runs[0.5][0]["grad_norm"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="hinge has no place for a row's probability"):
        run(inputs, tmp_path / "no", cache, monkeypatch, loss="hinge", beta=0.1, data=str(tmp_path / "0.7.jsonl"))


def test_the_reward_shift_is_the_mean_of_the_steps_before(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bco_pair's first step has none; a large shift that is learned changes the second step's loss."""
    lines = run(inputs, tmp_path / "run", tmp_path / "cache", monkeypatch, loss="bco_pair", beta=0.1)
    with monkeypatch.context() as without_learning:
        without_learning.setattr(RewardShift, "learn", lambda *_: None)
        without = run(inputs, tmp_path / "without", tmp_path / "cache", monkeypatch, loss="bco_pair", beta=0.1)
    assert lines[1]["loss"] == without[1]["loss"], "the first step moved both sides by nothing yet"
    assert lines[2]["loss"] != without[2]["loss"]
    assert lines[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-5)
    shift = RewardShift(0.1)
    assert shift.value == 0
    for line in lines[:2]:
        shift.learn(line)
    by_hand = [(line["logratios/chosen"] + line["logratios/rejected"]) / 2 for line in lines[:2]]
    assert shift.value == pytest.approx(0.1 * sum(by_hand) / 2) != 0


def test_wpo_weighs_pairs_by_the_policy(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step the weights are worked out here from the whole distributions."""
    cache = tmp_path / "cache"
    lines = run(inputs, tmp_path / "wpo", cache, monkeypatch, loss="dpo", beta=0.1, pair_weights="wpo")
    model = load_model(str(inputs / "model"), dtype=torch.float32, device=torch.device("cpu"))
    events = [json.loads(line) for line in (tmp_path / "wpo" / "events.jsonl").read_text().splitlines()]
    first = next(e for e in events if e["event"] == "rows")["rows"]
    rows = (inputs / "pairs.jsonl").read_text().splitlines()
    renderer = Renderer(model.tokenizer, eos_ids=eos_ids(str(inputs / "model"), model.tokenizer))
    weights = []
    for name in first:
        pair = json.loads(rows[int(name.rsplit(":", 1)[1]) - 1])
        prompt, logs = renderer.prompt_ids(pair["prompt"]), []
        for side in ("chosen", "rejected"):
            record = Demonstration(pair["prompt"], pair[side], Source("f", 1))
            (group,) = renderer.groups([record], Audit())
            ids = torch.tensor([*prompt.tolist(), *group.completions[0].ids.tolist()])
            with torch.no_grad():
                p = model.model(ids[None]).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
            drawn = p.gather(1, ids[len(prompt) :, None])[:, 0]
            logs.append((drawn.log() - p.square().sum(-1).log()).mean())
        weights.append(float(torch.exp(logs[0] + logs[1])))
    assert lines[0]["loss"] == pytest.approx(math.log(2) * sum(weights) / len(weights), rel=1e-4)


def test_a_weight_that_a_loss_cannot_use_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]
    write(tmp_path / "weighted.jsonl", [{**row, "weight": 0.5} for row in rows])
    data = str(tmp_path / "weighted.jsonl")
    with pytest.raises(DataError, match="aot has no place for a row's weight"):
        run(inputs, tmp_path / "aot", tmp_path, monkeypatch, loss="aot", beta=0.1, data=data)
    (half, *_) = run(inputs, tmp_path / "dpo", tmp_path, monkeypatch, loss="dpo", beta=0.1, data=data)
    assert half["loss"] == pytest.approx(math.log(2) / 2, abs=1e-5)


def test_a_reference_that_moves(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    still = run(inputs, tmp_path / "still", cache, monkeypatch, loss="dpo", beta=0.5)
    known = scored(cache)
    late = run(inputs, tmp_path / "late", cache, monkeypatch, loss="dpo", beta=0.5, move_reference_every=9)
    each = run(inputs, tmp_path / "each", cache, monkeypatch, loss="dpo", beta=0.5, move_reference_every=1)
    halfway: dict[str, Any] = {"beta": 0.5, "move_reference_every": 1, "move_reference_share": 0.5}
    half = run(inputs, tmp_path / "half", cache, monkeypatch, loss="dpo", **halfway)
    assert [m["loss"] for m in late] == pytest.approx([m["loss"] for m in still], rel=1e-4)
    assert [m["loss"] for m in each] == pytest.approx([math.log(2)] * 3, abs=1e-5), "always the policy itself"
    assert still[1]["loss"] < half[1]["loss"] < math.log(2), "half the way"
    assert scored(cache) == known, "a reference that moves is not kept"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"move_reference_share": 0.5}, "does nothing without move_reference_every"),
        ({"move_reference_every": 2, "lora_rank": 2}, "cannot be had with lora_rank"),
        ({"move_reference_every": 2, "loss": "simpo"}, "cannot be had with loss simpo"),
        ({"loss": "f_dpo", "loss_options": {"alpha": 0.5}}, "alpha goes with divergence alpha"),
        (
            {"loss": "simpo", "loss_options": {"gama": 1}},
            "loss_options gama is no parameter of loss simpo; it has beta",
        ),
        ({"loss": 5}, "a name, or a list of names"),
        ({"pair_weights": "wpo", "loss": "aot"}, "wpo does nothing with loss aot"),
        ({"loss": ["dpo", "kto"]}, "over different rows: dpo over pairs, kto over ratings"),
        ({"loss": ["dpo", "dpo=2"]}, "names an objective twice"),
        ({"loss_options": {"gamma": 1}}, "loss_options gamma does nothing with loss dpo; it is a parameter of simpo"),
        ({"loss_options": {"beta": 1}}, "loss_options is not the place of beta"),
        ({"loss": "dop"}, "did you mean dpo"),
    ],
)
def test_options_without_effect(settings: dict[str, Any], message: str) -> None:
    given = {"model": "m", "data": ("d",), "out": "o", "beta": "0.1", **settings}
    with pytest.raises(ConfigError, match=message):
        parse_config(DPOConfig, None, given)


def test_a_margin_is_left_aside_aloud(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]
    write(tmp_path / "margins.jsonl", [{**row, "margin": 0.5} for row in rows])
    run(inputs, tmp_path / "run", tmp_path, monkeypatch, loss="dpo", beta=0.1, data=str(tmp_path / "margins.jsonl"))
    assert capsys.readouterr().err.count("margin: a column of `prefopt reward`; it is left aside here") == 1


def test_a_probability_is_never_dropped(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(inputs / "soft.jsonl")
    with pytest.raises(DataError, match="plackett_luce has no place for a row's probability"):
        run(inputs, tmp_path / "pl", tmp_path, monkeypatch, loss="plackett_luce", beta=0.1, data=data)
    with pytest.raises(DataError, match="no row has one"):
        run(inputs, tmp_path / "hard", tmp_path, monkeypatch, loss="sppo_soft", beta=0.001)


def test_twins_are_of_other_prompts() -> None:
    groups = [group([1, 2], completion(5)), group([1, 2], completion(6)), group([3], completion(7))]
    made = mismatched(groups, 100)
    assert [(g.prompt_ids.tolist(), g.completions[0].ids.tolist()) for g in made] == [
        ([1, 2], [7]),
        ([1, 2], [7]),
        ([3], [5]),
    ]
    with pytest.raises(DataError, match="other prompts"):
        mismatched(groups[:2], 100)


def test_a_label_may_be_uncertain(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good with probability 0.2 is bad with probability 0.8; at one half nothing is to be learnt at first."""
    rows = [json.loads(line) for line in (inputs / "ratings.jsonl").read_text().splitlines()]
    turned = [{**row, "label": not row["label"], "probability": 0.2} for row in rows]
    data = {}
    for name, made in (("right", [{**row, "probability": 0.8} for row in rows]), ("turned", turned)):
        write(tmp_path / f"{name}.jsonl", made)
        data[name] = run(
            inputs,
            tmp_path / name,
            tmp_path,
            monkeypatch,
            loss="kto",
            beta=0.1,
            data=str(tmp_path / f"{name}.jsonl"),
        )
    sure = run(
        inputs, tmp_path / "sure", tmp_path, monkeypatch, loss="kto", beta=0.1, data=str(inputs / "ratings.jsonl")
    )
    assert [m["loss"] for m in data["right"]] == pytest.approx([m["loss"] for m in data["turned"]], rel=1e-5)
    assert data["right"][0]["grad_norm"] == pytest.approx(0.6 * sure[0]["grad_norm"], rel=1e-4)


def test_a_reference_moves_once_before_a_step_that_is_begun_again() -> None:
    """As after a failed step, whose checkpoint holds the reference as it had moved."""
    reference, policy = model_of("Llama", seed=1), model_of("Llama", seed=2)
    start = [p.detach().clone() for p in reference.parameters()]
    moving = MovingReference(reference, policy, "shared", every=2, share=0.5)
    moving.prepare()
    moving.learn()
    moving.prepare()
    assert all(torch.equal(a, b) for a, b in zip(start, reference.parameters(), strict=True)), "not yet"
    moving.learn()
    moving.prepare()
    kept = {name: tensor.clone() for name, tensor in moving.tensors.items()}
    resumed = MovingReference(model_of("Llama", seed=1), policy, "shared", every=2, share=0.5)
    for name, tensor in resumed.tensors.items():
        tensor.copy_(kept[name])
    for _ in range(2):
        resumed.learn()
    resumed.prepare()
    now = [tensor for name, tensor in resumed.tensors.items() if name != "moved"]
    for old, new, aim in zip(start, now, policy.parameters(), strict=True):
        torch.testing.assert_close(new, (old + aim) / 2)
