"""The report: what it says of a run's files, and that nothing in them can act in a browser."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from prefopt.errors import RunError
from prefopt.report.curves import draw_panels
from prefopt.report.page import write_report
from prefopt.run import RunFolder


class _Config(BaseModel):
    model: str = "models/start"
    beta: float = 0.1


class _Page(HTMLParser):
    """Elements with their attributes, and the text outside of <style>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cells: list[str] = []  # what stands in each element of class "said"
        self._in_style = False
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"
        if "said" in (dict(attrs).get("class") or "").split():
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False
        if tag == "div":
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data
        if self._in_cell:
            self.cells[-1] += data


def make_run(path: Path, **manifest: Any) -> RunFolder:
    return RunFolder.create(path, recipe="dpo", config=_Config(), manifest=manifest)


def report(run: RunFolder) -> _Page:
    return _Page(write_report(run.path).read_text(encoding="utf-8"))


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_dpo_run_in_one_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.log_metrics(0, "eval", {"loss": 0.6931, "rewards/accuracies": 0.5, "kl": 0.0, "pairs": 100})
    run.log_metrics(40, "eval", {"loss": 0.612, "rewards/accuracies": 0.73, "kl": 2.1, "pairs": 100})
    run.event("finished", step=40)
    # Wilson, 73 of 100, z = 1.96: centre (0.73 + 0.0192) / 1.0384 = 0.7215,
    # half width 1.96 * sqrt(0.73 * 0.27 / 100 + 0.000096) / 1.0384 = 0.0858.
    text = report(run).text
    assert (
        "Held-out accuracy 0.50 → 0.73 (95% interval 0.64 to 0.81, 100 pairs), "
        "KL 2.10 nats from the reference, loss 0.693 → 0.612, after 40 steps." in text
    )
    assert "not finished" not in text


def test_without_held_out_rows_the_training_ones_are_told_and_named_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.log_metrics(0, "train", {"loss": 3.0})
    run.log_metrics(7, "train", {"loss": 1.6})
    text = report(run).text
    assert "Training loss 3.000 → 1.600, after 7 steps." in text
    assert "This run is not finished: it stands at step 7." in text


def test_a_configuration_alone_makes_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: somewhere\nbeta: 0.3\n")
    page = _Page(write_report(tmp_path).read_text())
    assert "Nothing has been measured yet." in page.text
    assert "Nothing to warn about." in page.text
    assert "somewhere" in page.text and "0.3" in page.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "report.html"]


def test_warnings_stand_in_boxes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.event("warned", step=12, kind="kl", sentence="KL is running away: raise beta & rest.")
    page = report(run)
    assert "KL is running away: raise beta & rest." in page.text
    assert "at step 12" in page.text
    assert sum(a.get("class") == "warning" for _, a in page.elements) == 1
    assert "Nothing to warn about" not in page.text


HOSTILE = [
    "<script>alert(1)</script>",
    "</div></td></table><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; \" ' & <style>body{display:none}</style>",
    "<svg onload=alert(1)><a href='javascript:alert(1)'>x</a>",
    "]]> --> <!-- \u202e \x00 \u2028 next \x85 end",
]


def test_model_text_is_inert_and_shown_as_it_was_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data={"<script>d": "sha256:0"}, versions={"<script>v": "<script>"})
    write_lines(run.path / "samples.jsonl", [{"prompt": h, "before": h, "after": h} for h in HOSTILE])
    (run.path / "outcome.json").write_text(
        json.dumps({"title": HOSTILE[0], "text": HOSTILE[1], "rows": [[HOSTILE[3], HOSTILE[0], 0.5]]})
    )
    (run.path / "audit.json").write_text(
        json.dumps({"rows": 1, "kept": 1, "mended": 0, "refused": 0, "reasons": {"<script>": 1}, "format": "<script>"})
    )
    run.event("warned", step=0, kind="x", sentence=HOSTILE[0])
    run.event("path", step=0, path="<script>", reason="<script>", max_difference=1e-5)
    run.log_metrics(0, "train", {"loss": 1.0, "<script>alert($x$)": 2.0})
    page = report(run)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "a", "base"}
    assert [tag for tag, _ in page.elements].count("style") == 1
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.cells == [h for h in HOSTILE for _ in range(3)]


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.log_metrics(0, "train", {"loss": 1.0})
    path = write_report(run.path)
    text, page = path.read_text(), _Page(path.read_text())
    policy = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    addresses = [a[n] or "" for _, a in page.elements for n in ("src", "href", "xlink:href") if n in a]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "://" not in text
    assert not re.search(r"url\((?!#)|@import", text)


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "samples.jsonl").write_text('{"prompt": "p", "before": "\\ud83d", "after": ""}\n')
    assert report(run).cells == ["p", "\\ud83d", "(empty)"]


def test_what_it_was_made_of(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        model="sha256:aaaa",
        data={"pairs.jsonl": "sha256:bbbb", "folder": json.dumps({"part-0.parquet": "cccc"})},
        versions={"prefopt": "0.1.0", "torch": "2.13.0"},
    )
    run.event("path", step=0, path="shared", reason="fits", max_difference=2.3e-5)
    (run.path / "audit.json").write_text(
        json.dumps(
            {
                "rows": 2400,
                "kept": 2300,
                "mended": 60,
                "refused": 40,
                "reasons": {"identical_completions": 40, "completion_cut": 60},
                "format": "read as prompt/chosen/rejected",
                "train": 2260,
                "held_out": 100,
            }
        )
    )
    for step, rate in enumerate((100.0, 300.0, 200.0)):
        run.log_metrics(step, "train", {"loss": 1.0, "tokens_per_second": rate, "peak_memory_bytes": 5e8 + step})
    text = re.sub(r"\s+", " ", report(run).text)
    for expected in (
        "sha256:aaaa",
        "pairs.jsonlsha256:bbbb",
        "folder/part-0.parquetsha256:cccc",
        "shared path; 2.3e-05 nats a sequence at most",
        "read2,400",
        "refused40",
        "trained on2,260",
        "completion cut60 identical completions40",
        "200 tokens a second (median step)",
        "500 MB",
        "torch2.13.0",
        "beta0.1",
    ):
        assert expected in text, expected


def test_time_taken_leaves_out_the_pause_before_a_resumption(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    times = [
        ("00:00:00", "started"),
        ("00:00:10", "path"),  # 10 s
        ("00:01:00", "interrupted"),  # 50 s
        ("08:59:55", "path"),  # a pause
        ("09:00:00", "resumed"),
        ("09:00:30", "finished"),  # 30 s
    ]
    write_lines(
        run.path / "events.jsonl",
        [{"time": f"2026-01-01T{time}+00:00", "step": 5, "event": event, "path": "shared"} for time, event in times],
    )
    text = report(run).text
    assert "1 min 30 s" in text
    assert text.count("shared path") == 1
    assert "2026-01-01 09:00:00 UTC" in text


def test_the_outcome_stands_on_top(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "outcome.json").write_text(
        json.dumps(
            {"title": "Kinder?", "rows": [["Mean reward", -0.03125, 0.67], ["Wins", None, "0.84 (0.80 to 0.88)"]]}
        )
    )
    text = report(run).text
    assert "Mean reward\u22120.03120.670" in text.replace("\n", "")
    assert text.index("0.84 (0.80 to 0.88)") < text.index("Warnings")


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "audit.json", "samples.jsonl", "metrics.jsonl"])
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run.path / name).write_text('{"half": [\n')
    with pytest.raises(RunError, match=re.escape(name)):
        write_report(run.path)
    assert not (run.path / "report.html").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.yaml"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_report_replaces_the_first_and_is_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for step in range(5):
        run.log_metrics(step, "train", {"loss": 1.0 / (step + 1), "kl": float(step)})
    first = write_report(run.path).read_bytes()
    assert write_report(run.path).read_bytes() == first
    assert [p.name for p in run.path.iterdir() if p.name.startswith(".")] == []


def test_only_panels_with_numbers_are_drawn() -> None:
    lines = [
        {"step": 0, "split": "train", "loss": 0.69, "rewards/margins": 0.0, "grad_norm": None, "mine/own": 1},
        {"step": 1, "split": "train", "loss": 0.50, "rewards/margins": 0.4, "pairs_per_second": 3.0},
    ]
    panels = draw_panels(lines)
    assert [panel.title for panel in panels] == ["Loss", "Reward margin", "mine/own"]
    assert "ln 2" in panels[0].caption and ">ln 2<" in panels[0].svg
    assert all(panel.caption for panel in panels)
    sft = draw_panels([{"step": 0, "split": "train", "loss": 2.0}])
    assert ">ln 2<" not in sft[0].svg
    assert draw_panels([]) == []


def test_lines_are_told_apart_without_colour() -> None:
    lines = [
        {"step": step, "split": split, "rewards/chosen": 0.5 * step, "rewards/rejected": -1.0 * step}
        for step in (0, 1)
        for split in ("train", "eval")
    ]
    (panel,) = draw_panels(lines)
    assert re.findall(r">(chosen|rejected|0\.5|\u22121)</text>", panel.svg)[-4:] == [
        "chosen",
        "0.5",
        "rejected",
        "\u22121",
    ]
    # The chosen line is drawn whole, the rejected one dashed; held-out ones are bold.
    strokes = re.findall(
        r"style=\"fill: none; ([^\"]*stroke: var\(--(?:first|second)\); stroke-width: [^;\"]*)", panel.svg
    )
    assert sorted(("dasharray" in s, s.rpartition(" ")[2]) for s in strokes) == [
        (False, "0.9"),
        (False, "2.2"),
        (True, "0.9"),
        (True, "2.2"),
    ]
    assert not re.search(r"#[0-9a-f]{6}[;\"]", panel.svg)  # every colour is the page's


def test_a_long_run_is_averaged_and_says_so() -> None:
    lines = [{"step": step, "split": "train", "loss": float(step % 2)} for step in range(4000)]
    (panel,) = draw_panels(lines)
    assert panel.averaged == 10
    assert len(panel.svg) < 60_000
    assert "train ends at 1" in panel.svg  # the last step's own value, not a mean


def test_a_ppo_run_shows_reward_its_price_and_its_samples(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", recipe="ppo", config=_Config(), manifest={"reward": "sha256:7"})
    own = {"kl_coef": 0.05, "explained_variance": 0.5, "clip_fraction": 0.1, "value_clip_fraction": 0.2, "loss": 0.3}
    for step in range(2):
        measured = {"reward": 0.5 + step, "kl": 2.0 * step, "entropy": 3.0, "finished": 0.9, "lengths/sampled": 20.0}
        run.log_metrics(step, "eval", {**measured, "prompts": 9})
        run.log_metrics(
            step, "train", {**measured, **own, "prompts_per_second": 8.0, "ratio/first": 1.0, "updates": 4.0}
        )
        shown = {"prompt": f"Once {step}", "completion": HOSTILE[step], "reward": 0.25, "kl": -1.5}
        run.event("samples", step=step, samples=[shown])
    page = report(run)
    assert "Held-out reward 0.500 → 1.500, KL 2.00 nats from the reference, after 1 steps." in page.text
    assert page.cells == ["Once 1", HOSTILE[1]], "the last update's samples, as they were written"
    assert "0.250; −1.50" in page.text and "8.00 prompts a second" in page.text
    titles = [panel.title for panel in draw_panels(run.metrics(), "ppo")]
    assert titles == [
        *("Reward", "KL to the reference", "Price of KL", "Entropy", "Clipped tokens", "Explained variance"),
        *("Samples that end", "Loss", "Length of samples"),
    ]
