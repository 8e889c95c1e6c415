"""What `hafrm evaluate` does: measure one model, compare several, or run published benchmarks.

Which of the three follows from what was given; combinations in which something would be ignored are
refused.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from hafrm.errors import ConfigError
from hafrm.evaluation.benchmarks.run import Benchmarks, run_benchmarks
from hafrm.evaluation.compare import ModelComparison, compare
from hafrm.evaluation.evaluate import Evaluation, evaluate
from hafrm.scoring.loading import AUTO, Placement


def run_evaluation(  # noqa: PLR0913 - the verb and its options
    model: str | Path,
    data: Sequence[str],
    *,
    benchmark: Sequence[str] = (),
    benchmark_data: Path | None = None,
    also: Sequence[str] = (),
    against: Sequence[str] = (),
    policy: Path | None = None,
    reference: str | None = None,
    max_length: int | None = None,
    max_bad_fraction: float = 0.02,
    place: Placement = AUTO,
    done: Callable[[int, int], None] | None = None,
) -> Evaluation | ModelComparison | Benchmarks:
    """The model's metrics on `data`, its comparison with other models there, or its benchmarks.

    `also` are other seeds of the model, `against` the seeds of another. Raises ConfigError for options
    that do not go together.
    """
    if benchmark:
        _refuse(
            data or also or against, "--benchmark brings its own data: leave DATA and others out"
        )
        return run_benchmarks(
            model,
            benchmark,
            folder=benchmark_data,
            policy=policy,
            reference=reference,
            max_length=max_length,
            place=place,
            done=done,
        )
    _refuse(benchmark_data, "--benchmark-data needs --benchmark with a name")
    _refuse(not data, "hafrm evaluate needs DATA, or --benchmark with a name")
    if also or against:
        _refuse(policy or reference, "--also and --against judge each model by its own main head")
        return compare(
            [model, *also],
            against,
            data,
            max_length=max_length,
            max_bad_fraction=max_bad_fraction,
            place=place,
            done=done,
        )
    return evaluate(
        model,
        data,
        policy=policy,
        reference=reference,
        max_length=max_length,
        max_bad_fraction=max_bad_fraction,
        place=place,
        done=done,
    )


def _refuse(wrong: object, message: str) -> None:
    if wrong:
        raise ConfigError(message)
