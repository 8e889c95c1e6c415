"""The page: whole, self-contained, true to the files, safe with hostile text, and content with little."""

import itertools
import json
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from markupsafe import Markup
from typer.testing import CliRunner

from hafrm.cli import app
from hafrm.errors import CheckpointError, ConfigError
from hafrm.reporting import page as page_module
from hafrm.reporting import plots
from hafrm.reporting.folders import read_folders
from hafrm.reporting.page import render, write_report
from report_files import (
    HOSTILE,
    write_all,
    write_best_of_n,
    write_comparison,
    write_diagnostics,
    write_json,
    write_lines,
    write_rlhf_comparison,
    write_rlhf_run,
    write_run,
)

VOID = {"meta", "img", "br", "hr", "link", "input", "path", "line", "circle", "rect", "use"}
SECTIONS = ("summary", "accuracy", "comparison", "best-of-n", "rlhf", "training", "calibration")
SECTIONS += ("bias", "agreement", "noise", "representation", "reading", "provenance")


class Page(HTMLParser):
    """Reads a page, and fails on a tag that is not closed in its place or an id that is there twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        assert len(set(self.ids)) == len(self.ids), "an id is there twice"

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in {"style", "title"}:
            self.text.append(data)

    def _note(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def rendered(*folders: Path) -> str:
    return render(read_folders(folders))


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are left empty, which takes most of the time, where a test reads only the words."""
    monkeypatch.setattr(plots, "draw", lambda *_, **__: (Markup(""), (1.0, 1.0)))


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> str:
    """A page about one folder of every kind, all texts hostile."""
    return rendered(*write_all(tmp_path_factory.mktemp("all"), text=HOSTILE))


def test_every_section_is_there_in_well_formed_html(everything):
    page = Page(everything)
    anchors = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sorted(anchors) == sorted(SECTIONS)
    assert anchors[0] == "summary"
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a" and "class" not in attrs]
    assert links == [f"#{anchor}" for anchor in anchors]


def test_nothing_is_fetched_and_nothing_is_run(everything):
    page = Page(everything)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") for name in attrs), tag
        for name in ("href", "src", "xlink:href", "srcset", "data", "action"):
            assert (attrs.get(name) or "#").startswith("#"), attrs
        assert "url(" not in (attrs.get("style") or "")
    (style,) = re.findall(r"<style>(.*?)</style>", everything, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    policy = [attrs for tag, attrs in page.tags if attrs.get("http-equiv")]
    assert (policy[0]["content"] or "").startswith("default-src 'none'")


def test_hostile_text_is_shown_and_does_nothing(everything):
    page = Page(everything)
    assert HOSTILE in page.words
    assert "<script" not in everything
    assert "<img" not in everything
    assert everything.count("</style>") == 1


def test_a_hostile_folder_name_is_shown_as_it_is(tmp_path):
    """It stands in headings, attributes, table cells and inside plots, where a dollar is no formula."""
    folders = [write_run(tmp_path / name, "bt", steps=40) for name in ("<b>$x_1$</b>", "a & b")]
    html = rendered(*folders)
    assert "<b>$x" not in html
    words = Page(html).words
    assert "b>$x_1$<" not in words.replace("<b>$x_1$</b>", "")
    assert "a & b" in words


def test_text_that_is_no_text_breaks_nothing(tmp_path):
    """Control characters and half a surrogate pair, where plots, tables and passages show them."""
    odd = "a\x00b\x1b\ud800"
    folder = write_best_of_n(tmp_path / "odd", text=odd)
    found = json.loads((folder / "best_of_n.json").read_text())
    for model in found["models"]:
        model["name"] = odd
    write_json(folder / "best_of_n.json", found)
    assert write_report([folder], tmp_path / "r.html") > 10_000
    assert "a\N{REPLACEMENT CHARACTER}b" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_runs_on_different_test_sets_are_not_called_better_or_worse(tmp_path, undrawn):
    runs = [write_run(tmp_path / name, "bt", steps=40) for name in ("one", "two")]
    assert "is right most often" in Page(rendered(*runs)).words
    test = json.loads((runs[1] / "test.json").read_text())
    test["sets"] = test["sets"][:1]
    write_json(runs[1] / "test.json", test)
    words = Page(rendered(*runs)).words
    assert "is right most often" not in words
    assert "Accuracy on each run's test sets" in words


def test_the_numbers_on_the_page_are_those_of_the_files(tmp_path, undrawn):
    """64 % of 400 is 256 right; Wilson at z = 1.96 gives [0.592, 0.686] (centre 0.6387, half 0.0468)."""
    run = write_run(tmp_path / "haf", "haf")
    words = Page(rendered(run)).words
    assert "64.0 % [59.2, 68.6]" in words
    test = json.loads((run / "test.json").read_text())
    for each in test["sets"]:
        found = each["accuracy"]
        bounds = f"[{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
        assert f"{100 * found['value']:.1f} % {bounds}" in words
        assert f"{each['calibration']['log_loss']:.3f}" in words
    assert "6,400 comparisons of train" in words
    assert "ab" * 32 in words
    assert "0c5c0ba8f1d2" in words


def test_every_estimate_of_a_comparison_is_on_the_page_with_its_interval(tmp_path, undrawn):
    folder = write_comparison(tmp_path / "c")
    words = Page(rendered(folder)).words
    found = json.loads((folder / "comparison.json").read_text())
    assert len(found["accuracies"]) == 27
    for each in [
        *(c["accuracy"] for c in found["accuracies"]),
        next(iter(found["pick_longer"].values())),
    ]:
        low, high = (f"{100 * each[end]:.1f}" for end in ("low", "high"))
        assert f"{100 * each['value']:.1f} % [{low}, {high}]" in words
    for each in found["differences"]:
        value = each["difference"]
        low, high = (f"{100 * value[end]:.1f}".replace("-", "\u2212") for end in ("low", "high"))
        assert f"{100 * value['value']:+.1f} [{low}, {high}]" in words


def test_a_difference_is_called_real_only_where_its_adjusted_p_is_below_5_per_cent(
    tmp_path, undrawn
):
    folder = write_comparison(tmp_path / "c")
    path = folder / "comparison.json"
    found = json.loads(path.read_text())
    real = [d for d in found["differences"] if d["p_adjusted"] < 0.05]
    assert real
    words = Page(rendered(folder)).words
    assert (
        f"{len(real)} of {len(found['differences'])} differences between methods are real" in words
    )
    assert "> bt" in words
    for each in (*found["differences"], *found["average_differences"]):
        each["p_adjusted"] = 0.06
    path.write_text(json.dumps(found))
    words = Page(rendered(folder)).words
    assert f"None of {len(found['differences'])} differences between methods is real" in words
    assert "> bt" not in words


@pytest.mark.parametrize(
    ("write", "sections"),
    [
        (lambda f: write_run(f, "bt"), "summary accuracy training calibration bias provenance"),
        (write_comparison, "summary comparison provenance"),
        (write_best_of_n, "summary best-of-n reading provenance"),
        (write_rlhf_run, "summary rlhf reading provenance"),
        (write_rlhf_comparison, "summary rlhf provenance"),
        (
            write_diagnostics,
            "summary accuracy calibration bias agreement noise representation reading provenance",
        ),
    ],
)
def test_a_section_appears_when_its_data_is_there(tmp_path, write, sections):
    page = Page(rendered(write(tmp_path / "one")))
    assert [a["id"] for tag, a in page.tags if tag == "section"] == sections.split()


def without(value: object, key: str) -> object:
    """The same JSON with every `key` left out."""
    if isinstance(value, dict):
        return {k: without(v, key) for k, v in value.items() if k != key}
    return [without(v, key) for v in value] if isinstance(value, list) else value


def with_null(value: object, key: str) -> object:
    """The same JSON with every `key` null."""
    if isinstance(value, dict):
        return {k: None if k == key else with_null(v, key) for k, v in value.items()}
    return [with_null(v, key) for v in value] if isinstance(value, list) else value


def keys_of(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


@pytest.mark.slow
def test_a_page_comes_out_whatever_key_is_absent_or_null(tmp_path, undrawn):
    folders = write_all(tmp_path)
    files = [f for folder in folders for f in folder.glob("*.json")]
    for file in files:
        whole = json.loads(file.read_text())
        for key in sorted(keys_of(whole)):
            for changed in (without(whole, key), with_null(whole, key)):
                if changed:
                    file.write_text(json.dumps(changed))
                    Page(rendered(file.parent))
        file.write_text(json.dumps(whole))


def test_null_where_a_number_could_not_be_estimated_is_said_to_be_none(tmp_path, undrawn):
    run = write_run(tmp_path / "run", "haf")
    test = json.loads((run / "test.json").read_text())
    nothing = {"value": None, "low": 0.0, "high": 1.0, "num": 0}
    for each in test["sets"]:
        each["length"]["slices"]["longer"] |= nothing
        each["calibration"] = {"log_loss": None, "brier": None, "ece": None, "bins": []}
        each["length"]["pearson"] = None
    write_json(run / "test.json", test)
    words = Page(rendered(run)).words
    assert "n/a" in words
    assert "nan" not in words.lower().replace("provenance", "")


def test_falling_gold_is_told_where_intervals_show_it_and_not_where_noise_does(tmp_path, undrawn):
    """0.45 +- 0.06 at step 36 and 0.20 +- 0.06 at the end; with +- 0.2 nobody can tell.

    Without held-out prompts the 12 batches with gold fall into 2, 2, 3, 2, 3: the third mean is 0.444, the
    last 0.278 with twice its standard error 0.087; step 30 is the middle of the third part.
    """
    run = write_rlhf_run(tmp_path / "ppo")
    assert "gold reward of ppo was highest about step 36" in Page(rendered(run)).words
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "gold_low" in line:
            line |= {"gold_low": line["gold"] - 0.2, "gold_high": line["gold"] + 0.2}
    write_lines(run / "metrics.jsonl", lines)
    assert "was highest about" not in Page(rendered(run)).words
    write_lines(run / "metrics.jsonl", [r for r in lines if r["phase"] == "rlhf"])
    assert "was highest about step 30" in Page(rendered(run)).words


def test_a_suspicious_comparison_is_shown_once_with_all_that_is_told_of_it(tmp_path, undrawn):
    folder = write_diagnostics(tmp_path / "d")
    found = json.loads((folder / "diagnostics.json").read_text())
    found["worst"] = [found["worst"][0] | {"why": why} for why in ("first reason", "second reason")]
    write_json(folder / "diagnostics.json", found)
    words = Page(rendered(folder)).words
    assert "first reason, second reason" in words
    assert words.count("You make a small loop") == 1


def test_a_run_that_was_killed_early_or_never_evaluated_is_told_so(tmp_path, undrawn):
    run = write_run(tmp_path / "run", "bt")
    (run / "test.json").unlink()
    (run / "model").rmdir()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    words = Page(rendered(run)).words
    assert "run has not finished" in words
    assert "was not evaluated on a test set" in words


def test_a_long_run_makes_no_long_page(tmp_path):
    """20,000 logged steps; a page of one run stays under 1 MB."""
    run = write_run(tmp_path / "run", "haf")
    records = [
        {
            "step": i,
            "kind": "train",
            "loss": 1 / (1 + i),
            "reward_loss": 0.5,
            "grad_norm": 1.0 + i % 7,
        }
        for i in range(1, 20_001)
    ]
    write_lines(run / "metrics.jsonl", records)
    write_diagnostics(run, text="long " * 20_000)
    size = write_report([run], tmp_path / "out" / "report.html")
    assert size == (tmp_path / "out" / "report.html").stat().st_size < 1_000_000


def test_the_same_folders_give_the_same_page(tmp_path):
    folders = [write_best_of_n(tmp_path / "a"), write_diagnostics(tmp_path / "b")]
    first = write_report(folders, tmp_path / "1.html"), write_report(folders, tmp_path / "2.html")
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()
    assert first[0] == first[1]


def test_figures_and_tables_speak_to_those_who_do_not_see_them(everything):
    page = Page(everything)
    plots = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(plots) > 20
    assert all(len(attrs["aria-label"] or "") > 30 for attrs in plots)
    count = {
        tag: sum(t == tag for t, _ in page.tags) for tag in ("figure", "figcaption", "caption")
    }
    assert count["figure"] == count["figcaption"] == len(plots)
    assert count["caption"] == sum(tag == "table" for tag, _ in page.tags)
    scopes = [attrs.get("scope") for tag, attrs in page.tags if tag == "th"]
    assert set(scopes) == {"col", "row", "rowgroup"}
    boxes = [attrs for tag, attrs in page.tags if attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in boxes)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_colours_are_those_of_the_style_sheet_so_that_dark_mode_has_them_too(everything):
    plots = re.findall(r'<svg role="img".*?</svg>', everything, re.DOTALL)
    assert plots
    for plot in plots:
        assert not re.findall(r"#[0-9a-fA-F]{6}", plot)
        assert "var(--" in plot
        assert "<text" in plot  # text is text


def test_unknown_folders_and_broken_files_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_folders([tmp_path / "none"])
    write_run(tmp_path / "runs" / "haf", "haf", steps=20)
    with pytest.raises(CheckpointError, match=r"holds nothing to report.*did you mean .*haf"):
        read_folders([tmp_path / "runs"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="give the folder of a run"):
        read_folders([tmp_path / "empty"])
    (tmp_path / "empty" / "comparison.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"comparison\.json is not JSON"):
        read_folders([tmp_path / "empty"])


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "EXTRA", ("matplotlib", "no_such_package"))
    with pytest.raises(ConfigError, match=r"needs no_such_package: pip install 'hafrm\[report\]'"):
        write_report([tmp_path], tmp_path / "r.html")


def test_the_verb_writes_the_page_and_loads_no_torch(tmp_path):
    run = write_run(tmp_path / "haf", "haf", steps=50)
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(run), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "page.html" in result.output
    code = (
        "import sys, pathlib; from hafrm.reporting.page import write_report;"
        f"write_report([pathlib.Path({str(run)!r})], pathlib.Path({str(out)!r}));"
        "print({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules) or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert Page(out.read_text(encoding="utf-8")).words.startswith("Skip to the summary haf")


def test_the_template_lies_inside_the_package():
    files = resources.files("hafrm.reporting")
    assert all(files.joinpath(name).is_file() for name in ("page.html.j2", "page.css"))


@pytest.mark.slow
def test_the_wheel_holds_the_template(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    root = Path(__file__).resolve().parents[2]
    (built,) = wheel.WheelBuilder(str(root)).build(directory=str(tmp_path))
    names = zipfile.ZipFile(built).namelist()
    assert {"hafrm/reporting/page.html.j2", "hafrm/reporting/page.css"} <= set(names)
