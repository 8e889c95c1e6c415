"""The page about what tiny real runs write: whole, self-contained, true to results, safe with any text."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hafrm.benchmarks.benchmark_scores import BenchmarkResult, BenchmarkResults, BenchmarkScore
from hafrm.best_of_n.run_best_of_n import BestOfNOptions, best_of_n
from hafrm.diagnostics.model_runs import diagnose
from hafrm.errors import CheckpointError, ConfigError
from hafrm.evaluation import evaluate
from hafrm.evaluation.metrics import Evaluation
from hafrm.recipe_file import build_as
from hafrm.report import page as page_module
from hafrm.report.page import render_material, write_report
from hafrm.report.result_sections import evaluated_sets
from hafrm.report.run_files import read_material
from hafrm.results import read_result, write_result
from hafrm.rlhf.train_policy import train_policy
from hafrm.statistics import Estimate
from hafrm.study.study_result import StudyResult, Tuning, summarise
from hafrm.training import run_export
from hafrm.training.loop import run_training
from support.tiny_rlhf import tiny_rlhf
from support.tiny_runs import tiny_recipe, write_preferences

HOSTILE = (
    "<script>alert('x')</script> & \"q\" $\\alpha$ </style><img src=https://evil.example/x> \x1b"
)
VOID = {"meta", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Reads a page, and fails on a tag that is not closed in its place or an id that occurs twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert not self.open, f"never closed: {self.open}"
        assert len(set(ids)) == len(ids), "an id occurs twice"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in {"style", "title"}:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).replace("\N{NO-BREAK SPACE}", " ").split())

    @property
    def anchors(self) -> list[str | None]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


def by_length(_: object, text: str) -> float:
    return float(len(text))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A trained and diagnosed model, best-of-n, and RLHF, tiny and real; a study of random margins."""
    root = tmp_path_factory.mktemp("runs")
    test = write_preferences(root / "test.jsonl", 20, start=100)
    hostile = {"prompt": HOSTILE, "chosen": "yes " + HOSTILE, "rejected": "no"}
    test.write_text(test.read_text() + json.dumps(hostile) + "\n")
    other = write_preferences(root / "other.jsonl", 12, start=200)
    recipe = tiny_recipe(root, training={"steps": 4}, tracking={"log_every": 2})
    with pytest.MonkeyPatch.context() as patch:  # the export's proof takes longer than the rest
        patch.setattr(run_export, "check_golden", lambda _: {})
        run_training(recipe, root / "haf")
    sources = [str(test), str(other)]
    write_result(root / "haf" / "test.json", evaluate(root / "haf", sources))
    diagnosis = diagnose(root / "haf", sources, also=[root / "haf" / "model" / "policy"])
    write_result(root / "haf" / "diagnostics.json", diagnosis)
    rows = [{"prompt": f"{HOSTILE} {i}", "responses": ["a", "bb", "ccc", "dddd"]} for i in range(6)]
    candidates = root / "candidates.jsonl"
    candidates.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"models": ["length", "short"], "prompts": [str(candidates)], "gold": "truth"}
    golds = {"length": by_length, "truth": by_length, "short": lambda _, text: -len(text)}
    best_of_n(build_as(BestOfNOptions, {"pick": options}), root / "picks", golds=golds)
    draw, prompts = np.random.default_rng(0), np.arange(40).astype(str)
    outcomes = {
        ("train", scorer, test): (draw.normal(0.3, 1.0, (1, 40)), prompts)
        for scorer in ("bt", "haf", "haf (implicit)")
        for test in ("train", "other")
    }
    study = StudyResult(
        "recipe.yaml",
        "accuracy",
        seeds=(0,),
        pick_longer=dict.fromkeys(("train", "other"), Estimate(0.5, 0.4, 0.6, 40, "wilson")),
        learning_rates=(Tuning("bt", "train", 1e-3, ((1e-3, 0.6), (3e-3, None))),),
        seconds=1.0,
        **summarise(outcomes),
    )
    write_result(root / "study" / "comparison.json", study)
    shutil.copy(root / "haf" / "recipe.yaml", root / "study")
    train_policy(tiny_rlhf(root), root / "ppo")
    return {name: root / name for name in ("haf", "picks", "study", "ppo")}


@pytest.fixture(scope="module")
def html(folders) -> str:
    return render_material(read_material([*folders.values()]))


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_every_section_is_there_in_well_formed_html(page):
    assert page.anchors == [
        *("summary", "accuracy", "comparison", "best-of-n", "rlhf", "training", "calibration"),
        *("length", "diagnosis", "examples", "provenance"),
    ]
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a" and "class" not in attrs]
    assert links == [f"#{anchor}" for anchor in page.anchors]


@pytest.mark.parametrize(
    ("name", "anchors"),
    [
        ("study", "summary comparison provenance"),
        ("picks", "summary best-of-n provenance"),
        ("ppo", "rlhf examples provenance"),
    ],
)
def test_a_section_appears_where_its_data_is_there(folders, name, anchors):
    html = render_material(read_material([folders[name]]))
    assert Page(html).anchors == anchors.split()
    assert render_material(read_material([folders[name]])) == html  # same folders, same page


def test_nothing_is_fetched_and_nothing_is_run(page, html):
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") for name in attrs), tag
        for name in ("href", "src", "xlink:href", "srcset", "data", "action"):
            assert (attrs.get(name) or "#").startswith("#"), attrs
        assert "url(" not in (attrs.get("style") or "")
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert "url(" not in style and "@import" not in style
    policy = [attrs for _, attrs in page.tags if attrs.get("http-equiv")]
    assert policy[0]["content"].startswith("default-src 'none'")


def test_hostile_text_is_shown_and_does_nothing(page, html):
    assert HOSTILE.strip("\x1b ") in page.words
    assert "<script" not in html and "<img" not in html
    assert html.count("</style>") == 1


def test_a_hostile_folder_name_is_shown_as_it_is(folders, tmp_path):
    odd = tmp_path / "<b>$x_1$ & \udcff"
    odd.mkdir()
    for name in ("metrics.jsonl", "test.json"):
        shutil.copy(folders["haf"] / name, odd)
    assert write_report([odd], tmp_path / "page.html") > 10_000
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>$x" not in text and "<b>$x_1$ & ?" in Page(text).words


def test_every_interval_of_the_results_is_on_the_page(folders, page):
    (run,) = read_material([folders["haf"]]).folders
    (study,) = read_material([folders["study"]]).folders
    values = [s.accuracy for s in run.evaluation.sets]
    values += [s.implicit.accuracy for s in run.evaluation.sets]
    values += [style.picks_more for style in run.diagnosis.sets[-1].style if style.num >= 10]
    values += [a.accuracy for a in study.study.accuracies]
    values += [d.difference for d in study.study.differences]
    assert len(values) > 15
    for value in values:
        assert str(value).replace("-", "\N{MINUS SIGN}") in page.words
    assert run.sessions[0].data and all(
        digest in page.words for digest in run.sessions[0].data.values()
    )


def test_significance_is_what_the_study_says(folders, tmp_path):
    shutil.copytree(folders["study"], tmp_path / "study", ignore=shutil.ignore_patterns("runs"))
    file = tmp_path / "study" / "comparison.json"
    plain = json.loads(file.read_text())
    for p, significant in ((0.001, True), (0.2, False)):
        for contrast in (*plain["differences"], *plain["average_differences"]):
            contrast["p_adjusted"] = p
        file.write_text(json.dumps(plain))
        words = Page(render_material(read_material([tmp_path / "study"]))).words
        assert ("yes" in words.split()) is significant
        assert ("no average differs significantly" in words) is not significant
        assert ("differs from bt in" in words) is significant  # no column without a text


def test_figures_and_tables_have_names_for_screen_readers(page):
    plots = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(plots) > 20
    assert all(len(attrs["aria-label"]) > 15 for attrs in plots)
    counts = {
        tag: sum(t == tag for t, _ in page.tags)
        for tag in ("figure", "figcaption", "caption", "table")
    }
    assert counts["figure"] == counts["figcaption"] == len(plots)
    assert counts["caption"] == counts["table"]
    scopes = {attrs.get("scope") for tag, attrs in page.tags if tag == "th"}
    assert scopes == {"col", "row", "rowgroup"}


def test_unknown_folders_and_broken_files_are_refused_with_what_to_do(folders, tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_material([tmp_path / "none"])
    with pytest.raises(CheckpointError, match=r"holds nothing to report.*did you mean .*haf"):
        read_material([folders["haf"].parent])
    (tmp_path / "test.json").write_text('{"sets": 3}')
    problem = (
        r"test\.json is not a valid Evaluation of this version: "
        r"model: Field required \(problems: \d\); `"
    )
    with pytest.raises(CheckpointError, match=problem):
        read_material([tmp_path])
    (tmp_path / "test.json").unlink()
    for name, line in (("metrics", '{"loss": 1}'), ("samples", '{"step": 1, "prompt": []}')):
        (file := tmp_path / f"{name}.jsonl").write_text(line + "\n")
        with pytest.raises(
            CheckpointError, match=rf"{name}\.jsonl is not shown: .* of this version"
        ):
            read_material([tmp_path])
        file.unlink()


def test_files_of_another_version_are_named_and_the_rest_of_the_page_is_there(folders, tmp_path):
    run = shutil.copytree(folders["haf"], tmp_path / "run")
    (run / "test.json").write_text('{"sets": 3}')
    (run / "recipe.yaml").write_text("model: {pth: x}")
    (run / "samples.jsonl").write_text('{"step": 1}\n')
    page = Page(render_material(read_material([run])))
    for file in (
        "test.json is not shown",
        "recipe.yaml is not shown",
        "samples.jsonl is not shown",
    ):
        assert file in page.words
    assert {"training", "diagnosis"} <= set(page.anchors) and "accuracy" not in page.anchors


def test_what_evaluate_kept_in_the_run_is_shown_in_the_place_of_its_own_test(folders, tmp_path):
    run = shutil.copytree(folders["haf"], tmp_path / "run")
    own = read_result(run / "test.json", Evaluation)
    later = replace(own, sets=tuple(replace(s, name=f"later {s.name}") for s in own.sets))
    write_result(run / "evaluation.json", later)
    assert "held-out comparisons, later test" in Page(render_material(read_material([run]))).words
    write_result(run / "evaluation.json", replace(later, trained_on=("train.jsonl",)))
    words = Page(render_material(read_material([run]))).words
    assert "held-out comparisons" not in words and "was trained on train.jsonl" in words
    score = Estimate(0.25, 0.1, 0.4, 4, "wilson")
    scores = {"reward": BenchmarkScore(score, {"Chat": score}, {}, 0)}
    one = BenchmarkResult("rewardbench", "RewardBench v1", "x", 4, 4, {}, scores, 0, 0)
    write_result(run / "benchmarks.json", BenchmarkResults("run", 64, {}, (one,)))
    page = Page(render_material(read_material([run])))
    assert "later test" in page.words and "benchmarks" in page.anchors
    assert "RewardBench v1" in page.words and "25.0 % [10.0, 40.0]" in page.words


def test_other_data_of_the_same_name_are_a_test_set_of_their_own(folders, tmp_path):
    """The length baseline stands under its own comparisons."""
    runs = [shutil.copytree(folders["haf"], tmp_path / name) for name in ("later", "last")]
    own = read_result(folders["haf"] / "test.json", Evaluation)
    fewer = replace(own.sets[0].accuracy, num=7)
    other = replace(own, sets=(replace(own.sets[0], accuracy=fewer),))
    for run in runs:
        write_result(run / "test.json", other)
    sets = evaluated_sets(read_material([folders["haf"], *runs]))
    name = own.sets[0].name
    assert [run.name for run, _ in sets[name]] == ["haf"]
    assert [run.name for run, _ in sets[f"{name} of later"]] == ["later", "last"]


def test_a_run_shorter_than_a_logging_interval_is_a_run_all_the_same(folders, tmp_path):
    run = shutil.copytree(folders["haf"], tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(x for x in lines if '"validation"' in x))
    page = Page(render_material(read_material([run])))
    assert "What was trained" in page.words and "training" in page.anchors


def test_a_best_of_n_job_says_what_ran_it(folders):
    assert "Processes" in Page(render_material(read_material([folders["picks"]]))).words


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "EXTRA", ("matplotlib", "no_such_package"))
    with pytest.raises(ConfigError, match=r"needs no_such_package: pip install 'hafrm\[report\]'"):
        write_report([tmp_path], tmp_path / "r.html")


def test_the_verb_writes_the_page_and_loads_no_torch(folders, tmp_path):
    out, heavy = tmp_path / "page.html", {"torch", "transformers", "datasets", "pandas"}
    arguments = ["report", str(folders["haf"]), "--out", str(out)]
    code = (
        "import sys; from hafrm.cli import app;"
        f"app({arguments}, standalone_mode=False); print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "page.html" in done.stdout and done.stdout.endswith("set()\n")
    assert Page(out.read_text(encoding="utf-8")).words.startswith("Skip to the content haf")


@pytest.mark.slow
def test_the_wheel_holds_the_template(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    root = Path(__file__).resolve().parents[2]
    (built,) = wheel.WheelBuilder(str(root)).build(directory=str(tmp_path))
    names = zipfile.ZipFile(built).namelist()
    assert {"hafrm/report/page.html.j2", "hafrm/report/page.css"} <= set(names)
