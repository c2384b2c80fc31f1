"""Checkpoints: exact, whole or absent after a kill anywhere, never damaged unseen, never lost to a full disk."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.errors import RunError
from prefopt.train.checkpoint import (
    Checkpoint,
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)


def save(folder: Path, step: int, keep: int = 2, value: float | None = None) -> Path:
    weights = {"a": torch.full((3, 2), float(step) if value is None else value), "b": torch.arange(5)}
    state = {"note": f"of {step}"}
    return save_checkpoint(
        folder, step=step, tensors={"weights": weights, "rng": rng_tensors()}, state=state, keep=keep
    )


def load(folder: Path) -> Checkpoint | None:
    """The latest, where no damage is to be found."""

    def never(sentence: str) -> None:
        raise AssertionError(sentence)

    return load_latest(folder, never)


def steps(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bytes(one.contiguous().flatten().view(torch.uint8)) == bytes(other.contiguous().flatten().view(torch.uint8))
    )


def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    buffer = torch.randn(12)
    matrix = torch.randn(4, 3)
    tensors = {
        "plain": torch.tensor([float("nan"), -0.0, 1e-45, 3.4e38]),
        "low": torch.randn(3, 5).to(torch.bfloat16),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "turned": matrix.T,
        "unturned": matrix,
        "left": buffer[:8],
        "right": buffer[4:],
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    path = save_checkpoint(tmp_path / "c", step=120, tensors={"weights": tensors}, state={"lr": 1 / 3}, keep=1)
    assert path == tmp_path / "c" / "step-000120"
    assert steps(path) == ["SHA256SUMS.json", "state.json", "weights.safetensors"]
    found = load(tmp_path / "c")
    assert found is not None
    assert (found.step, found.path, found.state["lr"]) == (120, path, 1 / 3)
    loaded = found.tensors("weights")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor.detach()), name


def test_a_tied_weight_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    embedding = torch.randn(100, 50)
    tensors = {"embed": embedding, "other": torch.randn(2), "head": embedding}
    path = save_checkpoint(tmp_path, step=1, tensors={"weights": tensors}, state={}, keep=1)
    size = (path / "weights.safetensors").stat().st_size
    assert 20_008 <= size < 20_500  # 100 x 50 x 4 bytes once, 2 x 4 bytes, and the header
    found = load(tmp_path)
    assert found is not None
    loaded = found.tensors("weights")
    assert loaded["head"].data_ptr() == loaded["embed"].data_ptr()
    assert same(loaded["head"], embedding)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = save(tmp_path / "one", 7), save(tmp_path / "other", 7)
    for name in steps(one):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def adamw(parameters: list[torch.nn.Parameter], lr: float = 1e-2) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.3}]
    return torch.optim.AdamW(groups, lr=lr, amsgrad=True)


def rmsprop(parameters: list[torch.nn.Parameter], lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=lr, momentum=0.9, centered=True)


def parameters_like(values: list[Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(value.detach().clone()) for value in values]


def update(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters[:2]:  # the third never gets a gradient, so it has no state
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("make", [adamw, rmsprop])
@pytest.mark.parametrize("updates", [0, 3])
def test_an_optimiser_goes_on_as_if_it_had_never_stopped(
    tmp_path: Path, make: Callable[..., torch.optim.Optimizer], updates: int
) -> None:
    torch.manual_seed(0)
    parameters = parameters_like([torch.randn(4, 3), torch.randn(5), torch.randn(2)])
    optimizer = make(parameters, lr=1e-2)
    for seed in range(updates):
        update(parameters, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 1e-2 / 3
    tensors, state = optimizer_tensors(optimizer)
    save_checkpoint(tmp_path, step=3, tensors={"optimizer": tensors}, state={"optimizer": state}, keep=1)

    found = load(tmp_path)
    assert found is not None
    resumed = parameters_like(list(parameters))
    fresh = make(resumed, lr=7.0)
    load_optimizer_tensors(fresh, found.tensors("optimizer"), found.state["optimizer"])
    one, other = optimizer.state_dict(), fresh.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for number, values in one["state"].items():
        assert values.keys() == other["state"][number].keys()
        assert all(same(value, other["state"][number][name]) for name, value in values.items())
    for seed in range(10, 13):
        update(parameters, optimizer, seed)
        update(resumed, fresh, seed)
    assert all(same(a.detach(), b.detach()) for a, b in zip(parameters, resumed, strict=True))


def test_another_optimisers_state_is_refused() -> None:
    parameters = parameters_like([torch.randn(4, 3), torch.randn(5)])
    tensors, state = optimizer_tensors(rmsprop(parameters))
    with pytest.raises(RunError, match="does not fit"):
        load_optimizer_tensors(torch.optim.AdamW(parameters), tensors, state)
    with pytest.raises(RunError, match=r"(?s)state for 2 tensors.*expected: +1 tensors"):
        load_optimizer_tensors(rmsprop(parameters[:1]), tensors, state)


def test_random_generators_go_on(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.rand(3)
    save_checkpoint(tmp_path, step=0, tensors={"rng": rng_tensors()}, state={}, keep=1)
    expected = torch.rand(4)
    torch.manual_seed(6)
    found = load(tmp_path)
    assert found is not None
    restore_rng(found.tensors("rng"))
    assert torch.equal(torch.rand(4), expected)


def test_the_last_ones_are_kept_and_other_names_left_alone(tmp_path: Path) -> None:
    assert load(tmp_path / "none") is None
    for step in (5, 1_000_000, 999_999):  # numbers, not text, decide what is late
        save(tmp_path, step)
    (tmp_path / "step-by-step.txt").write_text("mine")
    save(tmp_path, 1_000_001)
    assert steps(tmp_path) == ["step-1000000", "step-1000001", "step-by-step.txt"]
    found = load(tmp_path)
    assert found is not None and found.step == 1_000_001
    assert found.state["note"] == "of 1000001"


def test_a_step_that_is_saved_whole_stays_as_it_is(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 3, value=-1.0)
    found = load(tmp_path)
    assert found is not None
    assert found.tensors("weights")["a"][0, 0] == 3.0


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".tmp-step-000009")
    found = load(tmp_path)
    assert found is not None and found.step == 1
    save(tmp_path, 2)
    assert steps(tmp_path) == ["step-000001", "step-000002"]


def flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


def test_damage_anywhere_is_named_and_passed_over(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    checked = 0
    for file in sorted(bad.iterdir()):
        whole = file.read_bytes()
        places = sorted({0, 1, 7, 8, 9, *range(0, len(whole), max(1, len(whole) // 9)), len(whole) - 1})
        damaged = [flipped(whole, at, bit) for at in places for bit in (0x01, 0x80)]
        damaged += [whole[:at] for at in places] + [whole + b"\n" if file.name != "SHA256SUMS.json" else b""]
        for content in damaged:
            file.write_bytes(content)
            said: list[str] = []
            found = load_latest(tmp_path, said.append)
            assert found is not None and found.path == good
            (sentence,) = said
            assert str(bad) in sentence
            assert file.name in sentence or file.name == "SHA256SUMS.json"
            checked += 1
        file.unlink()
        said = []
        assert load_latest(tmp_path, said.append) is not None
        assert f"{file.name} is missing" in said[0]
        file.write_bytes(whole)
    assert checked > 100
    found = load(tmp_path)
    assert found is not None and found.path == bad


def test_all_damaged_is_none(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    (tmp_path / "step-000003").mkdir()
    said: list[str] = []
    assert load_latest(tmp_path, said.append) is None
    assert [path in sentence for path, sentence in zip(("000003", "000002", "000001"), said, strict=True)] == [True] * 3


def test_a_damaged_one_never_pushes_out_a_good_one(tmp_path: Path) -> None:
    """Passed over at step 9, the run does the steps again; step 4's checkpoint is now all it has."""
    (save(tmp_path, 9) / "state.json").write_text("{}")
    save(tmp_path, 4, keep=1)
    assert steps(tmp_path) == ["step-000004"]
    (save(tmp_path, 8, keep=1) / "state.json").write_text("{}")
    save(tmp_path, 8, keep=1)
    found = load(tmp_path)
    assert found is not None and found.step == 8


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "checkpoints"
    save(folder, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9 - 999, free=999))
    with pytest.raises(RunError) as caught:
        save(folder, 2)
    # 6 float32 and 5 int64 are 64 bytes, torch's generator 5,056, and a mebibyte for headers
    assert caught.value.where == str(folder)
    assert caught.value.got == "999 bytes free"
    assert caught.value.expected == f"{64 + 5056 + 2**20:,} bytes"
    assert f"prefopt resume {tmp_path / 'run'}" in str(caught.value)
    assert steps(folder) == ["step-000001"]


FULL = """
import resource, sys
from pathlib import Path
import torch
from prefopt.errors import RunError
from prefopt.train.checkpoint import load_latest, save_checkpoint

folder = Path(sys.argv[1])
small = {"a": torch.ones(10)}
save_checkpoint(folder, step=1, tensors={"weights": small}, state={}, keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for tensors, state in (
    ({"weights": small, "optimizer": {"b": torch.ones(10_000)}}, {}),
    ({"weights": small}, {"long": "x" * 10_000}),
):
    try:
        save_checkpoint(folder, step=2, tensors=tensors, state=state, keep=1)
    except RunError as error:
        assert str(folder) in error.where and "bytes" in error.expected and "bytes free" in error.got, error
        print("refused")
    assert [p.name for p in folder.iterdir()] == ["step-000001"], list(folder.iterdir())
    assert load_latest(folder, sys.exit).step == 1
save_checkpoint(folder, step=2, tensors={"weights": small}, state={}, keep=1)
print([p.name for p in folder.iterdir()])
"""


def run_script(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_disk_that_fills_up_while_writing_costs_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the same write fails in the same way."""
    assert run_script(FULL, str(tmp_path / "checkpoints")).splitlines() == ["refused", "refused", "['step-000002']"]


KILLS = """
import json, os, shutil, sys
from pathlib import Path
import torch
from prefopt.train.checkpoint import load_latest, save_checkpoint

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def save(step):
    tensors = {"weights": {"w": torch.full((40,), float(step))}, "optimizer": {"m": torch.full((40,), -float(step))}}
    return save_checkpoint(folder, step=step, tensors=tensors, state={"twice": 2 * step}, keep=1)

def prepare(scene):
    shutil.rmtree(folder, ignore_errors=True)
    if scene == "first":
        return
    save(1)
    if scene == "over a damaged one":
        whole = folder / "aside"
        (folder / "step-000001").rename(whole)
        (save(2) / "state.json").write_text("{}")
        whole.rename(folder / "step-000001")
    if scene == "after a killed one":
        shutil.copytree(folder / "step-000001", folder / ".tmp-step-000002")

def die_at(n):
    # Audit events tell of open, mkdir, rename, remove, rmdir and scandir; fsync has none.
    seen = 0
    def call(*_):
        nonlocal seen
        seen += 1
        if seen == n:
            os._exit(9)
    sys.addaudithook(lambda event, _: call() if event == "open" or event.startswith(("os.", "shutil.")) else None)
    fsync = os.fsync
    os.fsync = lambda fd: (call(), fsync(fd))

def outcome():
    damage = []
    found = load_latest(folder, damage.append)
    if found is None:
        return 0, damage
    w, m = found.tensors("weights")["w"], found.tensors("optimizer")["m"]
    assert (w == found.step).all() and (m == -found.step).all() and found.state["twice"] == 2 * found.step
    return found.step, damage

def sweep(scene):
    outcomes = []
    while True:
        prepare(scene)
        child = os.fork()
        if child == 0:
            die_at(len(outcomes) + 1)
            save(2)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        step, damage = outcome()
        assert not damage or scene == "over a damaged one", damage
        outcomes.append(step)
        save(2)
        assert sorted(p.name for p in folder.iterdir()) == ["step-000002"] and outcome() == (2, [])
        if status == 0:
            return outcomes
        assert status == 9

scenes = ("first", "second", "over a damaged one", "after a killed one")
print(json.dumps({scene: sweep(scene) for scene in scenes}))
"""


def test_killed_at_any_call_the_folder_holds_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """The process ends just before its n-th call to the system, for every n there is, and saves again."""
    for scene, outcomes in json.loads(run_script(KILLS, str(tmp_path / "checkpoints"))).items():
        assert len(outcomes) > 20
        assert outcomes == sorted(outcomes)  # once the new one stands it stays
        assert set(outcomes) == {0 if scene == "first" else 1, 2}
