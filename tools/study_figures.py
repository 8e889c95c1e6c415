"""Draw the figures of docs/evidence.md from the files under results/.

python tools/study_figures.py results docs/pictures
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLOCKS = {
    "ethics-1k": "ETHICS, 960 pairs",
    "helpful-1k": "hh-helpful, 960 pairs",
    "ethics-4k": "ETHICS, 3,840 pairs",
    "harmless-1k": "hh-harmless, 960 pairs",
}
EQUAL_TO_ITS_REWARD_HEAD = "grm-sft (fused)"
MECHANISM = ("bt", "haf", "normbt", "bsr")
STATES = ("effective_rank", "norm_spread")
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "hafrm",  # the same drawing has the same ids
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def main(results: Path, pictures: Path) -> None:
    """Write every figure as an SVG file."""
    mpl.rcParams.update(SETTINGS)
    draw_differences(results, pictures / "differences.svg")
    if (results / "inside").is_dir():
        draw_mechanism(results / "inside", pictures / "mechanism.svg")


def draw_differences(results: Path, file: Path) -> None:
    """Every scorer's accuracy minus that of `bt`, with its interval: in each block and pooled."""
    blocks = {
        title: json.loads((results / name / "comparison.json").read_text())["average_differences"]
        for name, title in BLOCKS.items()
    }
    pooled = json.loads((results / "pooled.json").read_text())["pooled"]
    rows = list(
        dict.fromkeys(
            row["first"]
            for rows in blocks.values()
            for row in rows
            if row["first"] != EQUAL_TO_ITS_REWARD_HEAD
        )
    )
    figure = Figure(figsize=(7.2, 0.6 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind, title in zip(
        panels, ("in domain", "held out"), ("in domain", "mean out of domain"), strict=True
    ):
        for i, (label, differences) in enumerate(blocks.items()):
            points = {
                row["first"]: [row["difference"][end] for end in ("value", "low", "high")]
                for row in differences
                if row["test"] == kind and row["second"] == "bt"
            }
            dots(axes, rows, points, label, i, len(blocks) + 1)
        points = {
            row["scorer"]: row["minus_baseline"]
            for row in pooled
            if row["tests"] == kind and "p" in row
        }
        dots(axes, rows, points, "pooled", len(blocks), len(blocks) + 1)
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set_title(title, fontsize=9.0)
        axes.set_xlabel("accuracy minus that of bt, points")
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
    figure.savefig(file, metadata={"Date": None})


def dots(
    axes: Axes,
    rows: list[str],
    points: dict[str, list[float]],
    label: str,
    place: int,
    num_places: int,
) -> None:
    """One dot with a whisker in every row that has a point."""
    shift = 0.5 * (place - (num_places - 1) / 2) / num_places
    shown = [(rows.index(n) + shift, [100 * x for x in p]) for n, p in points.items() if n in rows]
    y = [place for place, _ in shown]
    colour = "black" if place == num_places - 1 else f"C{place}"
    axes.plot([p[0] for _, p in shown], y, "o", color=colour, markersize=3.5, label=label)
    axes.hlines(y, [p[1] for _, p in shown], [p[2] for _, p in shown], color=colour, linewidth=1.2)


def draw_mechanism(folder: Path, file: Path) -> None:
    """Effective rank and norm spread of the rewarded states (validation part) over the steps of every run
    METHOD-SEED; and print both at step 20 and at the end, and the accuracies on training and test pairs."""
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for color, method in enumerate(MECHANISM):
        for i, run in enumerate(sorted(folder.glob(f"{method}-[0-9]"))):
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            shown = {line["step"]: line for line in lines if "effective_rank" in line}
            for axes, key in zip(panels, STATES, strict=True):
                axes.plot(
                    [*shown],
                    [line[key] for line in shown.values()],
                    "o-",
                    color=f"C{color}",
                    label=method if i == 0 else None,
                    linewidth=1,
                    markersize=2,
                )
            sets = json.loads((run / "evaluation.json").read_text())["sets"]
            train, test = (100 * tested["accuracy"]["value"] for tested in sets[:2])
            states = [shown[step][key] for key in STATES for step in (20, max(shown))]
            print(
                f"{run.name}: rank {states[0]:.1f}, {states[1]:.1f}; norm spread {states[2]:.4f}, "
                f"{states[3]:.4f}; training pairs {train:.1f} %, test {test:.1f} %, gap {train - test:.1f}"
            )
    for axes, title in zip(
        panels, ("effective rank", "standard deviation of the norms / their mean"), strict=True
    ):
        axes.set_title(title, fontsize=9.0)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
    panels[0].legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
