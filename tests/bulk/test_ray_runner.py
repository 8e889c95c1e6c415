"""Ray Data gives the rows and scores of `hafrm score`; what one actor does is tested without Ray."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

import hafrm
from exports_for_tests import export_both
from hafrm.bulk.bulk_job import score_files
from hafrm.bulk.ray_runner import RayScorer, score_dataset
from hafrm.errors import ConfigError, ModelError

ROWS = [
    {"id": 0, "prompt": "Say sun.", "responses": ["sun", "no", "sun"]},
    {"id": 1, "prompt": "Say sea.", "responses": []},
    {"id": 2, "prompt": "Say sun.", "responses": ["rain " * k for k in range(1, 4)]},
    {"id": 3, "prompt": "Say " + "sea " * 300, "responses": ["sea"]},
    {"id": 4, "prompt": "Say sea.", "responses": ["sea, sea"]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    export_both(folder)
    return folder / "reward"


@pytest.fixture
def expected(model, tmp_path):
    """The same rows by `hafrm score`."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    score_files(model, [str(source)], out)
    return [json.loads(line) for line in out.read_text().splitlines()]


def check(found, expected):
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    for row, same in zip(found, expected, strict=True):
        assert row["rewards"] == (
            None if same["rewards"] is None else pytest.approx(same["rewards"], abs=1e-5)
        )
        assert (row["error"] or "").split(":")[0] == (same.get("error") or "").split(":")[0]


def test_an_actor_gives_a_table_the_scores_of_hafrm_score(model, expected):
    table = pa.Table.from_pylist(ROWS)
    found = RayScorer(str(model), "float32", None, "drop")(table)
    assert found.select(table.column_names).equals(table)
    check(found.to_pylist(), expected)


def test_nonsense_and_a_directory_without_a_head_are_refused(model):
    with pytest.raises(ConfigError, match="one of auto, float32"):
        score_dataset(None, str(model), dtype="int8")
    with pytest.raises(ConfigError, match="1 or more"):
        score_dataset(None, str(model), actors=0)
    with pytest.raises(ModelError, match="would be random"):
        RayScorer(str(model.parent / "policy"), "float32", None, "drop")


@pytest.mark.slow
def test_a_local_ray_gives_the_scores_of_hafrm_score(model, expected):
    """Two batches of rows, in their order, by one actor in a process of Ray's."""
    ray = pytest.importorskip("ray")
    path = os.pathsep.join([str(Path(hafrm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    try:
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        scored = score_dataset(
            ray.data.from_arrow(pa.Table.from_pylist(ROWS)), str(model), batch_size=3
        )
        check(scored.take_all(), expected)
    finally:
        ray.shutdown()
