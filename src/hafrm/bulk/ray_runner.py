"""Bulk scoring inside a Ray Data pipeline: `score_dataset` adds rewards to the rows of a Ray dataset.

For users with a Ray cluster; `hafrm score` needs none. Rows, columns, refusals and scores are those of
`hafrm score`; Ray does restarts and placement. Needs the extra `ray`.
"""

from typing import TYPE_CHECKING, Any, Literal

from hafrm.bulk.scored_rows import add_scores, encode_rows, score_rows
from hafrm.errors import ConfigError
from hafrm.scoring.loading import Placement
from hafrm.scoring.reward_model import RewardModel

if TYPE_CHECKING:
    import pyarrow as pa


def score_dataset(  # noqa: PLR0913 - how a cluster is used
    dataset: Any,
    model: str,
    *,
    actors: int = 1,
    gpus_per_actor: float = 0,
    batch_size: int = 1024,
    dtype: str = "auto",
    max_length: int | None = None,
    cut: bool = False,
) -> Any:
    """A Ray dataset with the same rows, their rewards and an `error` for rows without one.

    Each actor holds the model and takes `batch_size` rows at a time, which share prompts. The model's
    directory must be readable on every node. Ray Data is lazy: errors of the model or its scores are raised
    when rows are read. Raises ConfigError for an unknown dtype or no actor.
    """
    Placement(dtype)
    if actors < 1 or batch_size < 1:
        raise ConfigError(f"actors and batch_size must be 1 or more, got {actors} and {batch_size}")
    return dataset.map_batches(
        RayScorer,
        fn_constructor_args=(model, dtype, max_length, "cut" if cut else "drop"),
        batch_size=batch_size,
        batch_format="pyarrow",
        concurrency=actors,
        num_gpus=gpus_per_actor or None,
    )


class RayScorer:
    """An actor's reward model; called with a table of rows, it returns the table with scores."""

    def __init__(
        self, model: str, dtype: str, max_length: int | None, too_long: Literal["cut", "drop"]
    ) -> None:
        self.model = RewardModel.from_pretrained(
            model, dtype=dtype, max_length=max_length, too_long=too_long
        )

    def __call__(self, table: "pa.Table") -> "pa.Table":
        """The table with its score columns; raises NumericsError for a score that is not finite."""
        rows = table.to_pylist()
        encoded = encode_rows(self.model.encoder, rows, range(len(rows)))
        return add_scores(table, rows, score_rows(self.model, encoded))
