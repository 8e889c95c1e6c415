"""The demo from start to end: a language model, three reward models and their comparison, in minutes.

The world is made up, so the truth is known; the steps are those for real data. A second run resumes.
"""

import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from hafrm.atomic import atomic_directory, atomic_write
from hafrm.demo.base_model import pretrain
from hafrm.evaluation import evaluate
from hafrm.evaluation.metrics import Evaluation
from hafrm.export.model_card import write_cards
from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe
from hafrm.report.page import missing_packages, write_report
from hafrm.results import Cell, Column, Table, write_result
from hafrm.training.loop import run_training

METHODS = {"haf": 1e-3, "bt": 1e-3, "dpo": 5e-4}
"""Peak learning rates that suit such a small model; the best step is chosen by validation."""
LABELS = {"haf": "HAF, both heads", "bt": "BT, reward head", "dpo": "DPO, policy head"}
TEST_SETS = ("chat", "safety", "chat-ood", "safety-ood")

NEXT_STEPS = """
On your own data (a base model, and preferences with prompt, chosen, rejected):
  hafrm data preferences.jsonl
  hafrm train recipes/tiny-cpu.yaml model.path=MODEL data.train=preferences.jsonl --out run
  hafrm evaluate run held-out.jsonl"""


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's files are, and every method's evaluation on the four test sets."""

    folder: Path
    evaluations: dict[str, Evaluation]
    report: Path | None  # the page about all three runs; None without the extra that it needs

    def table(self) -> Table:
        """Agreement with the gold preference, in and out of domain, for every method."""
        rows: list[tuple[Cell, ...]] = [
            (LABELS[method], *(s.accuracy for s in evaluation.sets))
            for method, evaluation in self.evaluations.items()
        ]
        first = next(iter(self.evaluations.values()))
        rows.append(("the longer one", *(s.length.pick_longer for s in first.sets)))
        columns = tuple(map(Column, ("method", *TEST_SETS, "all")))
        return Table("agreement with the gold preference [95 %]", columns, tuple(rows))


def run_demo(folder: Path, *, on_stage: Callable[[str], None]) -> DemoResult:
    """Write the world, pretrain, train and evaluate; `on_stage` is called with a line per stage."""
    world = json.loads(lzma.decompress(files("hafrm.demo").joinpath("world.json.xz").read_bytes()))
    data = {name: folder / "data" / f"{name}.jsonl" for name in world["sets"]}
    for name, rows in world["sets"].items():
        atomic_write(data[name], "".join(json.dumps(row) + "\n" for row in rows))
    base = folder / "base"
    if not base.is_dir():
        conversations = [tuple(c) for c in world["pretraining"]]
        on_stage(f"1/5 pretraining a small language model on {len(conversations)} conversations")

        def every_tenth(step: int, num_steps: int) -> None:
            if step % max(1, num_steps // 10) == 0:
                on_stage(f"    step {step}/{num_steps}")

        # a killed pretraining leaves no partial model behind, which `is_dir` would accept as a whole one
        with atomic_directory(base) as aside:
            loss = pretrain(aside, conversations, on_progress=every_tenth)
        on_stage(f"    loss {loss:.3f} nat per token")
    evaluations = {}
    for number, method in enumerate(METHODS, start=2):
        out = folder / method
        on_stage(f"{number}/5 training {LABELS[method]}")
        if not (out / "model").is_dir():  # an export is the last thing that a run does
            resume = (out / "recipe.yaml").is_file()
            run_training(demo_recipe(method, base, data), out, resume=resume)
    on_stage("5/5 evaluating on four test sets, labelled by the gold preference")
    for method in METHODS:
        sources = [str(data[f"test-{name}"]) for name in TEST_SETS]
        evaluations[method] = evaluate(folder / method, sources)
        # where `hafrm train` writes the results, which evaluates the recipe's test sets itself
        write_result(folder / method / "test.json", evaluations[method])
        write_cards(folder / method)
    report = None
    if not missing_packages():
        report = folder / "report.html"
        write_report([folder / method for method in METHODS], report)
    return DemoResult(folder, evaluations, report)


def demo_recipe(method: str, base: Path, data: dict[str, Path]) -> Recipe:
    """The recipe of one method; only the objective and its learning rate differ."""
    return build_recipe(
        {
            "model": {"path": str(base)},
            "data": {
                "train": [str(data["train"])],
                "validation": [str(data["validation"])],
                "test": [str(data[f"test-{name}"]) for name in TEST_SETS],
                "max_length": 256,
            },
            "method": {"name": method},
            "training": {"epochs": 3.0, "batch_size": 16, "max_tokens": 2048}
            | {"learning_rate": METHODS[method]},
            "evaluation": {"every": 50, "metric": "loss"},
            "checkpoint": {"every": 0},
            "tracking": {"log_every": 25},
        },
        name=f"the demo's {method} recipe",
    )
