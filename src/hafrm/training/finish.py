"""The end of a run: exported models, their golden scores, and the proof that others load them.

`model/` appears in the run folder only when a fresh process with plain transformers has reproduced
the golden scores, so its presence means that the run is complete.
"""

import logging

import torch

from hafrm.engine.model import HybridModel
from hafrm.recipe import Recipe
from hafrm.runs import RunFolder, atomic_directory
from hafrm.scoring.export import export_policy, export_reward, gather_weights
from hafrm.scoring.scorer import ImplicitRule, write_implicit_rule
from hafrm.scoring.verify import check_golden, write_golden
from hafrm.training import parallel
from hafrm.training.methods import POLICY_LOSSES, Method
from hafrm.training.prepare import PreparedData

log = logging.getLogger("hafrm")


def export_run(
    run: RunFolder, recipe: Recipe, method: Method, data: PreparedData, model: HybridModel
) -> None:
    """Write `model/reward` and `model/policy`, as far as the method trained them; all ranks call."""
    folder = run.path / "model"
    if folder.is_dir():
        return
    dtype = export_dtype(recipe)
    weights = gather_weights(model)
    if parallel.is_main():
        with atomic_directory(folder) as aside:
            if model.reward_head is not None:
                export_reward(weights, data.encoder, aside / "reward", dtype=dtype)
                golden = write_golden(aside / "reward", data.golden)
                differences = check_golden(aside / "reward")
                log.info("%d golden scores replayed by plain transformers: %s", golden, differences)
            if model.policy_head is not None:
                export_policy(weights, data.encoder, aside / "policy", dtype=dtype)
                write_implicit_rule(aside / "policy", implicit_rule(recipe, method))
    parallel.wait()


def export_dtype(recipe: Recipe) -> torch.dtype:
    """What a run's models are stored in: what it computed in."""
    return torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32


def implicit_rule(recipe: Recipe, method: Method) -> ImplicitRule:
    """How the trained policy scores a response by itself."""
    assert method.policy_loss is not None
    loss = POLICY_LOSSES[method.policy_loss]
    return ImplicitRule(
        reference=recipe.model.path if loss.needs_reference else None,
        beta=method.beta,
        per_token=loss.per_token,
    )
