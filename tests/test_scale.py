"""benchmarks/scale.py: its traffic and times by hand, its command line."""

import pytest

from support.recipe_models import config_of
from support.scripts import load_script


@pytest.fixture(scope="module")
def scale():
    return load_script("benchmarks/scale")


def scenario(scale, *, lora: bool = False, checkpointing: bool = True):
    training = {
        "precision": "bf16",
        "gradient_checkpointing": checkpointing,
        "batch_size": 8,
        "parallel": "fsdp",
    }
    recipe = scale.recipe_of(training=training, **({"lora": {"rank": 4}} if lora else {}))
    return scale.Scenario(config_of("llama"), recipe, (30, 20, 10))


def machine(scale, memory: float = 1.0):
    return scale.Machine(peak=1e12, mfu=0.5, node=4e9, network=1e9, memory=memory)


def test_traffic_is_two_gathers_of_the_layers_one_of_the_outside_and_one_scatter(scale):
    """4 ranks move 3/4 of it: layers 2 + 2 bytes a weight, outside 2, gradients 4, once a step."""
    ours = scenario(scale)
    weights = ours.weights
    layers = weights.total - weights.outside
    once = 0.75 * (4 * layers + 2 * weights.outside + 4 * weights.trainable)
    assert ours.traffic(4, 1) == pytest.approx(once)
    assert ours.traffic(4, 2) - once == pytest.approx(0.75 * (4 * layers + 2 * weights.outside))


@pytest.mark.parametrize(
    ("lora", "checkpointing", "times"),
    [(False, True, 1.0), (False, False, 1.5), (True, True, 1.0), (True, False, 1.0)],
)
def test_traffic_hides_from_where_a_layer_computes_as_long_as_the_next_is_moved(
    scale, lora, checkpointing, times
):
    """Forward: 2 FLOP a weight and token against 2 bytes. Backward, all weights trained: 6 bytes against
    4 FLOP, with checkpointing 6. Adapters' gradients weigh nothing. At 5e11 FLOP/s and 4e9 B/s: 125."""
    ours = scenario(scale, lora=lora, checkpointing=checkpointing)
    assert ours.hiding_tokens(machine(scale), 4e9) == pytest.approx(125 * times)


def test_what_does_not_fit_whole_is_cut_into_micro_batches(scale):
    """LoRA, whose gradients are small: one GPU with room for the states and some of the activations."""
    ours = scenario(scale, lora=True, checkpointing=False)
    whole = ours.row(1, machine(scale))
    need = whole.bytes
    states = (need.step - need.activations - need.working) / 2**30
    cut = ours.row(
        1, machine(scale, memory=(states + 0.4 * (whole.bytes.step / 2**30 - states)) / 0.9)
    )
    assert cut.fits
    assert cut.micro_batches > 1
    assert cut.tokens == -(-480 // cut.micro_batches)
    nothing = ours.row(1, machine(scale, memory=states / 2))
    assert not nothing.fits


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
