"""`train_policy`: a policy trained against reward models, in a run folder, by the recipe's algorithm."""

from pathlib import Path

import torch

from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.errors import CheckpointError, ConfigError
from hafrm.rlhf.ppo import Ppo
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from hafrm.rlhf.rlhf_run import RlhfResult, RlhfRun
from hafrm.rlhf.trl_runs import check_trl, run_trl
from hafrm.scoring.loading import default_device
from hafrm.training import parallel
from hafrm.training.checkpoint import open_run
from hafrm.training.setup import choose_precision


def train_policy(
    recipe: RlhfRecipe, folder: Path, *, resume: bool = False, gold: GoldReward | None = None
) -> RlhfResult:
    """Train a policy as the recipe says; returns once the best step is exported to `model/policy`.

    `gold` is the known truth, where there is one: it is logged and selects the best step, never trained on.
    Raises ConfigError, DataError or ModelError before the first batch; NumericsError before an update
    that would follow a number that is not finite; CheckpointError for a folder that cannot be resumed;
    StoppedError after a signal.
    """
    native = recipe.algorithm.name == "ppo"
    if resume and not native:
        raise CheckpointError(
            f"algorithm {recipe.algorithm.name} runs on TRL, whose checkpoints are pickles, so it keeps "
            "none: start again with another --out, or take algorithm ppo, which resumes"
        )
    if not native:
        check_trl(recipe)
    if parallel.start().size > 1:
        raise ConfigError(
            "hafrm rlhf runs in one process, and several were started: docs/rlhf.md says how to use the "
            "reward model from OpenRLHF, verl or TRL on several GPUs"
        )
    recipe = with_rlhf_precision(recipe)
    run = open_run(recipe, folder, resume=resume)
    with run.lock():
        torch.manual_seed(recipe.training.seed)
        # TRL runs the backbone itself, in the attention that transformers gave it
        rlhf = RlhfRun(recipe, run, gold, share=native)
        rlhf.record_provenance()
        return Ppo(rlhf).train(resume=resume) if native else run_trl(rlhf)


def with_rlhf_precision(recipe: RlhfRecipe) -> RlhfRecipe:
    """The recipe with training.precision decided for this machine, as `with_precision` does."""
    precision = choose_precision(recipe.training.precision, default_device().type)
    training = recipe.training.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"training": training})
