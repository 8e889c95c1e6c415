"""benchmarks/scale.py: its traffic by hand, its command line."""

import pytest

from support.forked import on_ranks
from support.recipe_models import config_of
from support.scripts import load_script


@pytest.fixture(scope="module")
def scale():
    return load_script("benchmarks/scale")


def scenario(scale, mode):
    """The model that `traffic` of parallel_worker trains."""
    training = {"precision": "bf16", "gradient_checkpointing": True, "parallel": mode}
    return scale.Scenario(config_of("llama"), scale.recipe_of(training=training), (30, 20, 10))


def test_traffic_is_two_gathers_of_all_weights_and_one_scatter_and_nodes_add_up_shards(scale):
    """4 ranks move 3/4 of it: 2 + 2 bytes a weight, gradients 4, once or each time. 16 GPUs in 2 nodes:
    7/8 of it, and an eighth of the gradients there and back, 1/2 of it from the other node."""
    ours, copies = scenario(scale, "fsdp"), scenario(scale, "hsdp")
    weights = ours.weights
    gathers, scatter = 4 * weights.total, 4 * weights.trainable
    assert ours.traffic(4, 1, 1) == pytest.approx((0.75 * (gathers + scatter), 0))
    assert ours.traffic(4, 2, 1) == pytest.approx((0.75 * (2 * gathers + scatter), 0))
    assert ours.traffic(4, 2, 2) == pytest.approx((0.75 * 2 * (gathers + scatter), 0))
    assert copies.traffic(16, 1, 1) == pytest.approx((7 / 8 * (gathers + scatter), scatter / 8))


def test_two_ranks_move_in_a_step_what_the_script_says(scale, tmp_path):
    """FSDP2's own exchanges, counted: above by the padding of rows that do not divide, 1 %."""
    on_ranks("traffic", tmp_path, str(tmp_path / "moved"))
    ours = scenario(scale, "fsdp")
    moved = float((tmp_path / "moved").read_text())
    assert 1.0 <= moved / ours.traffic(2, 1, 1)[0] < 1.01


def test_the_script_prints_its_tables_for_a_config_file(scale, tmp_path, capsys):
    config_of("llama").save_pretrained(tmp_path)
    scale.main(["--config", str(tmp_path), "--lora", "--lengths", "hh", "--gpus", "2", "8"])
    output = capsys.readouterr().out
    rows = [
        line.split("|")[1:-1] for line in output.splitlines() if line.startswith(("| 2 ", "| 8 "))
    ]
    assert [len(row) for row in rows] == [10, 10, 7, 7]
    assert "1 x 4,800" in output
    scale.main(["--cost", "--gpus", "8", "512"])
    costs = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(costs) == 11  # 70 G weights in full fit no 8
    assert [row[2].strip() for row in costs[:2]] == ["fsdp", "hsdp"]
    with pytest.raises(SystemExit, match="llama-70b"):
        scale.main(["--config", str(tmp_path / "nowhere")])
