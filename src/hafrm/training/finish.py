"""The end of a run: exported models, their golden scores, and the proof that others load them.

`model/` appears in the run folder only when a fresh process with plain transformers has reproduced
the golden scores, so its presence means that the run is complete. Until then, and where the proof
fails, the models lie in `model.unverified/`.
"""

import logging
from pathlib import Path

import torch

from hafrm.atomic import atomic_directory
from hafrm.engine.model import HybridModel
from hafrm.engine.packing import free_memory
from hafrm.recipe import Recipe
from hafrm.run_folder import RunFolder
from hafrm.scoring.export import export_policy, export_reward, gather_weights
from hafrm.scoring.fused import write_fused_rule
from hafrm.scoring.model_card import write_cards
from hafrm.scoring.scorer import ImplicitRule, write_implicit_rule
from hafrm.scoring.verify import check_golden, prove, write_golden
from hafrm.training import parallel
from hafrm.training.batches import References
from hafrm.training.methods import Method
from hafrm.training.prepare import PreparedData
from hafrm.training.validation import fit_on_validation

log = logging.getLogger("hafrm")


def export_run(
    run: RunFolder,
    recipe: Recipe,
    method: Method,
    data: PreparedData,
    model: HybridModel,
    references: References | None = None,
) -> None:
    """Write `model/reward` and `model/policy`, as far as the method trained them, and where it trained
    both the rule of their fused score, fitted on validation with its `references`.

    All ranks call. Those that write nothing return before the proof, which may take an hour. The model is
    empty afterwards: its memory is the proof's. Raises VerificationError where the proof fails; the models
    are then kept.
    """
    folder = run.path / "model"
    if folder.is_dir():
        return
    dtype = export_dtype(recipe)
    rule = None
    if method.trains_reward and method.trains_policy:
        rule = fit_on_validation(
            model,
            data.validation,
            references,
            method,
            max_tokens=2 * recipe.training.token_budget,
            autocast=torch.bfloat16 if dtype == torch.bfloat16 else None,
        )
        log.info("fitted on validation: %s", rule)
    weights = gather_weights(model)
    if not parallel.is_main():
        return
    with atomic_directory(run.unverified_path, replace=True) as aside:
        if model.reward_head is not None:
            export_reward(weights, data.encoder, aside / "reward", dtype=dtype)
        if model.policy_head is not None:
            export_policy(weights, data.encoder, aside / "policy", dtype=dtype)
            write_implicit_rule(aside / "policy", implicit_rule(recipe, method))
        if rule is not None:
            write_fused_rule(aside, rule)
    del weights
    model.to("meta")  # whoever still holds it, its memory is free
    free_memory()

    def check(models: Path) -> None:
        if (models / "reward").is_dir():
            num_golden = write_golden(models / "reward", data.golden)
            differences = check_golden(models / "reward")
            log.info("%d golden scores replayed by plain transformers: %s", num_golden, differences)
        write_cards(run.path, models)

    prove(
        run.unverified_path,
        folder,
        check,
        f"the training is finished and loses nothing. Repeat the export and its proof with: hafrm train "
        f"--resume {run.path}; or see what differs with: hafrm verify {run.unverified_path / 'reward'}",
    )


def export_dtype(recipe: Recipe) -> torch.dtype:
    """What a run's models are stored in: what it computed in."""
    return torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32


def implicit_rule(recipe: Recipe, method: Method) -> ImplicitRule:
    """How the trained policy scores a response by itself."""
    assert method.policy_loss is not None
    return ImplicitRule(
        reference=recipe.model.path if method.scores_against_reference else None,
        beta=method.beta,
        per_token=method.scores_per_token,
    )
