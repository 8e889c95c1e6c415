"""`hafrm demo`: a language model, three reward models and their comparison, from nothing, in minutes.

The world is made up (see `world`), so the truth is known and no download is needed; the path is the one
that real data takes: files, recipes, run folders, evaluation. A second run finds what the first one
finished and goes on where it was.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from hafrm.atomic import atomic_directory, atomic_write
from hafrm.demo.pretrain import Progress, pretrain
from hafrm.demo.world import TEST_SETS, make_world, pretraining_texts, write_world
from hafrm.evaluation.evaluate import Evaluation, evaluate
from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe
from hafrm.reporting.page import missing_packages, write_report
from hafrm.scoring.model_card import write_cards
from hafrm.tables.cells import stacked
from hafrm.training.loop import train

METHODS = {"haf": 1e-3, "bt": 1e-3, "dpo": 5e-4}
"""Peak learning rates, of the size that suits so small a model; the best step is kept by validation."""
NUM_PRETRAINING = 16_000
LABELS = {"haf": "HAF, both heads", "bt": "BT, reward head", "dpo": "DPO, policy head"}


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's files are, and every method's evaluation on the four test sets."""

    folder: Path
    evaluations: dict[str, Evaluation]
    report: Path | None
    """The page about all three; None without the extra that it takes."""


def run(folder: Path, *, tell: Callable[[str], None]) -> DemoResult:
    """Make the world, pretrain, train and evaluate; `tell` hears a line per stage."""
    base = folder / "base"
    files = write_world(make_world(), folder / "data")
    if not base.is_dir():
        tell(f"1/5 pretraining a small language model on {NUM_PRETRAINING} conversations")
        with atomic_directory(base) as aside:
            loss = pretrain(
                aside, pretraining_texts(0, NUM_PRETRAINING), on_step=_every_tenth(tell)
            )
        tell(f"    loss {loss:.3f} nat per token")
    evaluations = {}
    for number, method in enumerate(METHODS, start=2):
        out = folder / method
        tell(f"{number}/5 training {LABELS[method]}")
        if not (out / "model").is_dir():
            train(recipe(method, base, files), out, resume=_started(out))
    tell("5/5 evaluating on four test sets, labelled by the gold preference")
    for method in METHODS:
        sources = [str(files[f"test-{name}"]) for name in TEST_SETS]
        found = evaluations[method] = evaluate(folder / method, sources)
        # as `hafrm train` leaves them, where it evaluates the recipe's test sets itself
        atomic_write(folder / method / "test.json", json.dumps(found.to_dict(), indent=1) + "\n")
        write_cards(folder / method)
    return DemoResult(folder, evaluations, _report(folder))


def _report(folder: Path) -> Path | None:
    """One page about the three runs, where the extra for it is installed."""
    if missing_packages():
        return None
    page = folder / "report.html"
    write_report([folder / method for method in METHODS], page)
    return page


def recipe(method: str, base: Path, files: dict[str, Path]) -> Recipe:
    """The recipe of one method; only the objective and its learning rate differ."""
    return build_recipe(
        {
            "model": {"path": str(base)},
            "data": {
                "train": [str(files["train"])],
                "validation": [str(files["validation"])],
                "test": [str(files[f"test-{name}"]) for name in TEST_SETS],
                "max_length": 256,
            },
            "method": {"name": method},
            "training": {
                "epochs": 3.0,
                "batch_size": 16,
                "learning_rate": METHODS[method],
                "max_tokens": 2048,
            },
            "evaluation": {"every": 50, "metric": "loss"},
            "checkpoint": {"every": 0},
            "tracking": {"log_every": 25},
        },
        name=f"the demo's {method} recipe",
    )


def _started(folder: Path) -> bool:
    """Whether a killed demo left a run to go on with."""
    return (folder / "recipe.yaml").is_file()


def _every_tenth(tell: Callable[[str], None]) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if progress.step % max(1, progress.num_steps // 10) == 0:
            tell(f"    step {progress.step}/{progress.num_steps}  loss {progress.loss:.3f}")

    return on_step


def tables(result: DemoResult) -> Iterator[RenderableType]:
    """Accuracy in and out of domain for every method, then what to type next."""
    table = Table(title="agreement with the gold preference [95 %]", title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in (*TEST_SETS, "all"):
        table.add_column(name, justify="right", no_wrap=True)
    for method, evaluation in result.evaluations.items():
        table.add_row(
            LABELS[method], *(stacked(each.metrics.accuracy.estimate) for each in evaluation.sets)
        )
    first = next(iter(result.evaluations.values()))
    baseline = [each.metrics.length.pick_longer.estimate for each in first.sets]
    table.add_row("the longer one", *map(stacked, baseline))
    yield table
    if result.report is None:
        yield "\nCurves, calibration and texts on one page: pip install 'hafrm\\[report]'"
    else:
        yield f"\nCurves, calibration and more on one page: {result.report}"
    yield (
        "\nOn your own data (a base model, and preferences with prompt, chosen, rejected):\n"
        "  hafrm data preferences.jsonl\n"
        "  hafrm train recipes/tiny-cpu.yaml model.path=MODEL data.train=preferences.jsonl --out run\n"
        "  hafrm evaluate run held-out.jsonl"
    )
