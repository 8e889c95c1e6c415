"""benchmarks/scale.py: its traffic by hand, its command line."""

import pytest

from support.recipe_models import config_of
from support.scripts import load_script


@pytest.fixture(scope="module")
def scale():
    return load_script("benchmarks/scale")


def test_traffic_is_two_gathers_of_the_layers_one_of_the_outside_and_one_scatter(scale):
    """4 ranks move 3/4 of it: layers 2 + 2 bytes a weight, outside 2, gradients 4, once or each time."""
    training = {"precision": "bf16", "gradient_checkpointing": True, "batch_size": 8}
    recipe = scale.recipe_of(training={**training, "parallel": "fsdp"})
    ours = scale.Scenario(config_of("llama"), recipe, (30, 20, 10))
    weights = ours.weights
    layers = weights.total - weights.outside
    once = 0.75 * (4 * layers + 2 * weights.outside + 4 * weights.trainable)
    assert ours.traffic(4, 1, 1) == pytest.approx(once)
    gathers = 0.75 * (4 * layers + 2 * weights.outside)
    assert ours.traffic(4, 2, 1) - once == pytest.approx(gathers)
    assert ours.traffic(4, 2, 2) == pytest.approx(2 * once)


def test_the_script_prints_its_tables_for_a_config_file(scale, tmp_path, capsys):
    config_of("llama").save_pretrained(tmp_path)
    scale.main(["--config", str(tmp_path), "--lora", "--lengths", "hh", "--gpus", "2", "8"])
    output = capsys.readouterr().out
    rows = [
        line.split("|")[1:-1] for line in output.splitlines() if line.startswith(("| 2 ", "| 8 "))
    ]
    assert [len(row) for row in rows] == [9, 9, 7, 7]
    assert "38,400 tokens" in output
    with pytest.raises(SystemExit, match="llama-70b"):
        scale.main(["--config", str(tmp_path / "nowhere")])
