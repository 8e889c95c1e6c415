"""Other people's software on an exported directory gives its golden scores: TRL, transformers' pipeline.

What needs an environment of its own (rewardbench, vLLM) is in examples/consumers; see docs/consumers.md.
"""

import pytest

from support.scripts import load_script


def test_the_pipeline_gives_the_golden_scores_one_by_one_and_in_batches(exported):
    """float32; 1e-5 relative to max(1, |reward|), as between padded and single sums of a shallow model."""
    assert (
        load_script("examples/consumers/text_classification").run(str(exported / "reward")) < 1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_trl_rewards_its_completions_with_our_scores(exported, tmp_path, trainer):
    """Two steps of a random policy: the mean reward that TRL logs is the mean that hafrm gives its texts.

    float32 on both sides; TRL logs means, padded on the right, hence 1e-4.
    """
    pytest.importorskip("trl")
    pairs = load_script("examples/consumers/trl_online").run(
        trainer, str(exported / "reward"), str(exported / "policy"), steps=2
    )
    assert len(pairs) == 2
    for theirs, ours in pairs:
        assert theirs == pytest.approx(ours, abs=1e-4)
    assert pairs[0] != pairs[1]
