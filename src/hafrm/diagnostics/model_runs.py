"""`diagnose`: runs a reward model, and optionally others, one at a time, and gathers all diagnostics."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray

from hafrm.diagnostics.breakdown import (
    audit_labels,
    divisions_of,
    slice_accuracies,
    style_biases,
    worst_errors,
)
from hafrm.diagnostics.diagnosis import Diagnosis, SetDiagnosis, StateMatrix, describe_states
from hafrm.engine.layout import Branches, Layout
from hafrm.engine.model import HybridModel, hidden_size
from hafrm.errors import ConfigError, ModelError
from hafrm.evaluation.comparisons import Comparisons, Data, Margins, read_comparisons
from hafrm.evaluation.heads import EvaluationOptions, load_head, score_groups, scorer_names
from hafrm.evaluation.metrics import pairwise_accuracy, temperature
from hafrm.preferences import TokenizedGroup
from hafrm.progress import OnProgress, no_progress, over_passes
from hafrm.recipe_file import load_recipe
from hafrm.scoring.forward import PerResponse, run_sequences
from hafrm.scoring.loading import Heads, find_heads, load_policy
from hafrm.scoring.model_files import load_config
from hafrm.scoring.reward_model import PolicyModel, RewardModel, forward_options
from hafrm.statistics import SEED

log = logging.getLogger("hafrm")

MAX_STATES = 2048  # responses whose hidden states are measured; the same ones for every model


@dataclass(frozen=True)
class ScoredModel:
    """The scores of one model on the comparisons, by its main head."""

    name: str
    scored_with: str
    scores: NDArray[np.float32]  # of each response; NaN if it cannot be encoded
    drawn: Sequence[TokenizedGroup]  # the drawn responses that it can encode
    has_states: Bool[np.ndarray, " drawn"]  # whether it can encode each drawn response
    states: StateMatrix  # of those that it can


def diagnose(
    model: str | Path,
    data: Data,
    *,
    also: Sequence[str | Path] = (),
    base: str | Path | None = None,
    options: EvaluationOptions | None = None,
    on_progress: OnProgress = no_progress,
) -> Diagnosis:
    """Every diagnostic of a model on the comparisons of the data.

    `also` are more models (seeds, methods), for the label audit and for comparing states. `base` is the
    checkpoint that training began with; for a run folder, it is taken from the recipe.
    """
    options = options or EvaluationOptions()
    name, names = str(model), [str(model), *map(str, also)]
    if len(set(names)) < len(names):
        raise ConfigError("a model is given twice; --also takes other models than MODEL")
    models = {path: find_heads(path) for path in names}
    recipe, is_given = Path(model) / "recipe.yaml", base is not None
    if base is None and recipe.is_file():
        # a recipe of another kind of run, or a base that no longer exists
        with contextlib.suppress(ConfigError, ModelError):
            start = Path(load_recipe(recipe).model.path)
            # owner/name on the hub, unless it looks like a folder that no longer exists
            is_hub = len(start.parts) == 2 and not start.parent.exists()
            if start.is_dir() or is_hub:
                load_config(start)
                base = start
    elif base is not None:
        load_config(base)  # here, and not after minutes of scoring
    comparisons = read_comparisons(data, options.max_bad_fraction)[1].decided()
    num_states = min(MAX_STATES, comparisons.num_responses)
    total = (comparisons.num_responses + num_states) * len(models) + num_states * (base is not None)
    done = over_passes(on_progress, total)
    own, *others = (_score(path, models[path], comparisons, options, done) for path in names)
    before = None
    try:
        before = None if base is None else _base_states(base, own, options, done)
    except ModelError as error:  # such as a reward model without a language-model head
        if is_given:
            raise
        log.warning("not compared with the base: %s", error)
    scored = (own, *others)
    common = np.logical_and.reduce([m.has_states for m in scored])  # the same responses for all
    states = [m.states[common[m.has_states]] for m in scored]
    if before is not None:
        before = before[common[own.has_states]]
    comparisons = comparisons.scored_by(*(m.scores for m in scored))
    margins = np.stack([comparisons.margins(m.scores) for m in scored])
    return Diagnosis(
        model=name,
        scored_with=own.scored_with,
        sets=tuple(
            _diagnose_set(part, comparisons.take(where), margins[0][where])
            for part, where in comparisons.sets().items()
        ),
        label_noise=audit_labels(comparisons, margins, names),
        representations=tuple(
            describe_states(m.name, s, before) for m, s in zip(scored, states, strict=True)
        ),
        base=None if before is None else describe_states(str(base), before),
        num_states=int(common.sum()),
        worst=worst_errors(comparisons, margins),
    )


def _score(
    name: str, heads: Heads, comparisons: Comparisons, options: EvaluationOptions, done: OnProgress
) -> ScoredModel:
    head = scorer_names(heads)[0]
    log.info("scoring with %s", name)
    options = options.cut_as_trained(heads)
    scorer = load_head(heads, head, options)
    scores, tokenized, _ = score_groups(scorer, comparisons.groups, options, done)
    assert isinstance(scorer, RewardModel | PolicyModel)
    is_drawn, is_encoded = draw_responses(len(scores)), ~np.isnan(scores)
    drawn = keep_responses(tokenized, is_drawn[is_encoded])
    # the states are those that the head reads, of the backbone that scored
    states = last_states(scorer.model, drawn, done)
    return ScoredModel(name, head, scores, drawn, is_encoded[is_drawn], states)


def _diagnose_set(name: str, comparisons: Comparisons, margins: Margins) -> SetDiagnosis:
    prompts, texts = comparisons.prompts, (comparisons.chosen_texts, comparisons.rejected_texts)
    return SetDiagnosis(
        name=name,
        num=len(comparisons),
        accuracy=pairwise_accuracy(margins, prompts),
        temperature=temperature(margins, prompts),
        style=style_biases(margins, *texts, prompts),
        slices=slice_accuracies(margins, divisions_of(comparisons), prompts),
    )


def _base_states(
    path: str | Path, trained: ScoredModel, options: EvaluationOptions, done: OnProgress
) -> StateMatrix:
    """The base model's states for the same ids; raises ModelError for a base of another shape."""
    model = load_policy(path, dtype=options.dtype, device=options.device)
    config = model.backbone.config
    size, vocabulary = hidden_size(config), config.get_text_config().vocab_size
    groups = trained.drawn
    # the base is run on the trained model's ids, so both must have one vocabulary
    largest = max(int(ids.max()) for g in groups for ids in (g.prompt_ids, *g.response_ids))
    if size != trained.states.shape[1] or largest >= vocabulary:
        raise ModelError(
            f"{path} (hidden size {size}, vocabulary {vocabulary}) is not the base model of {trained.name} "
            f"(hidden size {trained.states.shape[1]}, ids up to {largest}); give that one as `base`"
        )
    return last_states(model, groups, done)


def last_states(
    model: HybridModel, groups: Sequence[Branches], on_progress: OnProgress = no_progress
) -> StateMatrix:
    """The hidden state of every response's last token, float32, in the order of `groups`."""

    def run(layout: Layout) -> PerResponse:
        with torch.no_grad():
            return (model.last_states(layout.to(model.device)),)

    sequences = run_sequences(run, groups, **forward_options(model))
    num = sum(len(group.response_ids) for group in groups)
    states = np.empty((num, hidden_size(model.backbone.config)), np.float32)
    num_done = 0
    for indices, (values,) in sequences:
        assert values is not None
        states[indices] = values.float().cpu().numpy()
        num_done += len(indices)
        on_progress(num_done, num)
    return states


def draw_responses(
    num_responses: int, num: int = MAX_STATES, seed: int = SEED
) -> Bool[np.ndarray, " responses"]:
    """Which responses of all are drawn, at most `num`; the same for all models of these data."""
    is_drawn = np.zeros(num_responses, bool)
    is_drawn[np.random.default_rng(seed).permutation(num_responses)[:num]] = True
    return is_drawn


def keep_responses(
    groups: Sequence[TokenizedGroup], is_kept: Bool[np.ndarray, " responses"]
) -> Sequence[TokenizedGroup]:
    """Some of the responses, with their prompts, in the order of the groups."""
    counts = [len(group.response_ids) for group in groups]
    parts = np.split(is_kept, np.cumsum(counts)[:-1])
    return [
        replace(group, response_ids=tuple(group.response_ids[i] for i in np.flatnonzero(part)))
        for group, part in zip(groups, parts, strict=True)
        if part.any()
    ]
