"""`diagnose`: runs one reward model, and others beside it, and gathers every diagnostic.

One model is in memory at a time, and no model is changed. The other modules compute, each one thing, from
the arrays that are made here.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.data.encoding import Encoder
from hafrm.diagnostics.breakdown import divisions_of, slice_accuracies, style_biases
from hafrm.diagnostics.diagnosis import Diagnosis, SetDiagnosis
from hafrm.diagnostics.hidden_states import last_states, some_responses
from hafrm.diagnostics.label_noise import audit_labels, cut_text, prompt_text, worst_errors
from hafrm.diagnostics.margins import margin_histogram, temperature
from hafrm.diagnostics.own_policy import (
    Continuation,
    OwnPolicyPreference,
    RewardPreference,
    policy_text,
    reward_preferences,
)
from hafrm.diagnostics.representation import describe_states
from hafrm.engine.model import HybridModel, hidden_size
from hafrm.engine.sampling import Sampling, sample
from hafrm.errors import ConfigError, DataError, ModelError
from hafrm.evaluation.comparisons import Comparisons, Data, Indices, Margins, read_comparisons
from hafrm.evaluation.heads import (
    IMPLICIT,
    REWARD,
    LoadOptions,
    load_head,
    scorer_names,
)
from hafrm.evaluation.metrics import agreement, calibration, pairwise_accuracy
from hafrm.preferences import Group, TokenizedGroup, prompt_key
from hafrm.progress import OnProgress, no_progress, over_passes
from hafrm.recipe_file import load_recipe
from hafrm.scoring.loading import (
    Heads,
    find_heads,
    load_causal_lm,
    load_config,
    load_encoder,
    load_policy,
)
from hafrm.scoring.reward_model import PolicyModel, RewardModel
from hafrm.statistics import SEED

log = logging.getLogger("hafrm")

MAX_STATES = 2048
"""Responses whose hidden states are measured; the same ones for every model."""
BASE = "base model"
MAX_NEW_TOKENS = 128
"""Of a continuation, if the models take as many."""
NUM_CONTINUATIONS = 3
"""Prompts of which all continuations are kept as examples."""


@dataclass(frozen=True)
class ScoredModel:
    """One model on the comparisons."""

    name: str
    scored_with: str
    """"reward" or "implicit reward"."""
    tokenized: list[TokenizedGroup]
    """The groups as the model sees them."""
    margins: Margins
    states: Float[np.ndarray, "responses hidden"]
    """Of some of the responses, the same ones for all models."""


def diagnose(  # noqa: PLR0913 - every way to say what is diagnosed
    model: str | Path,
    data: Data,
    *,
    also: Sequence[str | Path] = (),
    policy: str | Path | None = None,
    reference: str | Path | None = None,
    base: str | Path | None = None,
    num_generations: int = 0,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    max_bad_fraction: float = 0.02,
    on_progress: OnProgress = no_progress,
) -> Diagnosis:
    """Every diagnostic of a model on the comparisons of the data.

    `also` are further models (seeds, methods), for the label audit and to compare states with. `base` is
    the checkpoint that training began with; a run folder's is its recipe's. With `num_generations`
    policies write on so many prompts.

    Raises DataError for a source that has only ties, NumericsError for scores that are not finite, and
    what `evaluate` raises.
    """
    models = _find_models(model, also, policy, reference)
    base = _base_of(model) if base is None else Path(base)
    if base is not None:
        load_config(base)  # here, and not after minutes of scoring
    if num_generations:
        find_policies(models, base)  # raises before anything is scored
    comparisons = _read(data, max_bad_fraction)
    num = sum(len(group.responses) for group in comparisons.groups)
    done = over_passes(on_progress, num * (len(models) + 1))
    options = LoadOptions(max_length=max_length, dtype=dtype, device=device)
    own_options = LoadOptions(reference, max_length, dtype, device)
    name, heads = next(iter(models.items()))
    own = _score(name, heads, comparisons, own_options, done)
    implicit = _implicit_margins(heads, comparisons, own_options, done)
    start = None if base is None else _base_states(base, own)
    others = [_score(str(m), models[str(m)], comparisons, options, done) for m in also]
    margins = np.stack([scored.margins for scored in (own, *others)])
    preference = None
    if num_generations:
        groups = comparisons.groups
        preference = prefer_own_policy(models, base, groups, num_generations, options, on_progress)
    return Diagnosis(
        model=name,
        scored_with=own.scored_with,
        sets=tuple(
            _diagnose_set(part, comparisons.take(where), own.margins, implicit, where)
            for part, where in comparisons.sets().items()
        ),
        label_noise=audit_labels(comparisons, margins, list(models)),
        representations=tuple(describe_states(m.name, m.states, start) for m in (own, *others)),
        base=None if start is None else describe_states(str(base), start),
        num_states=len(own.states),
        own_policy=preference,
        worst=worst_errors(comparisons, margins),
    )


def _score(
    name: str, heads: Heads, comparisons: Comparisons, options: LoadOptions, done: OnProgress
) -> ScoredModel:
    """The model's main head on the comparisons; the model is freed again."""
    head = scorer_names(heads)[0]
    log.info("scoring with %s", name)
    scorer = load_head(heads, head, options)
    tokenized, _ = scorer.encoder.encode(comparisons.groups)
    margins = comparisons.margins(scorer.score_encoded(tokenized, done))
    assert isinstance(scorer, RewardModel | PolicyModel)
    # the states are those that the head reads, of the backbone that scored
    return ScoredModel(name, head, tokenized, margins, _states(scorer.model, tokenized))


def _implicit_margins(
    heads: Heads, comparisons: Comparisons, options: LoadOptions, done: OnProgress
) -> Margins | None:
    """Margins of the policy's implicit reward, if the model has both heads."""
    if heads.reward is None or heads.policy is None:
        return None
    log.info("scoring with the policy %s", heads.policy)
    scorer = load_head(heads, IMPLICIT, options)
    tokenized, _ = scorer.encoder.encode(comparisons.groups)
    return comparisons.margins(scorer.score_encoded(tokenized, done))


def _find_models(
    path: str | Path,
    also: Sequence[str | Path],
    policy: str | Path | None,
    reference: str | Path | None,
) -> dict[str, Heads]:
    """The heads of every model by its name, the first one's policy replaced by `policy`.

    Raises ConfigError for a model given twice, and for options that would be ignored.
    """
    names = [str(path), *map(str, also)]
    if len(set(names)) < len(names):
        raise ConfigError("a model is given twice; --also takes other models than MODEL")
    own = find_heads(path, policy)
    if policy is not None and own.reward is None:
        raise ConfigError(f"--policy goes with a reward model, and {path} is a policy itself")
    if reference is not None and own.policy is None:
        raise ConfigError(f"--reference is of a policy, and {path} has none; give --policy too")
    return {names[0]: own} | {name: find_heads(name) for name in names[1:]}


def _read(data: Data, max_bad_fraction: float) -> Comparisons:
    """The comparisons that are no ties; raises DataError for a source that has none."""
    reading, comparisons = read_comparisons(data, max_bad_fraction)
    decided = comparisons.decided()
    for name in dict.fromkeys(group.source for group in reading.groups):
        if name not in decided.by_source():
            raise DataError(
                f"{name} holds no comparison that annotators decided (all are ties, or nothing is "
                "compared); leave it out"
            )
    return decided


def _base_of(path: str | Path) -> Path | None:
    """The model that a run folder's recipe began with, if it is still there."""
    recipe = Path(path) / "recipe.yaml"
    if not recipe.is_file():
        return None
    base = Path(load_recipe(recipe).model.path)
    return base if base.is_dir() else None


def _diagnose_set(
    name: str, comparisons: Comparisons, margins: Margins, implicit: Margins | None, where: Indices
) -> SetDiagnosis:
    """The comparisons of one set, which are at `where` among all margins."""
    prompts, own = comparisons.prompts, margins[where]
    texts = comparisons.chosen_texts, comparisons.rejected_texts
    return SetDiagnosis(
        name=name,
        num=len(comparisons),
        accuracy=pairwise_accuracy(own, prompts),
        temperature=temperature(own, prompts),
        calibration=calibration(own),
        margins=margin_histogram(own),
        style=style_biases(own, *texts, prompts),
        slices=slice_accuracies(own, divisions_of(comparisons), prompts),
        agreement=None if implicit is None else agreement(own, implicit[where], prompts),
    )


def _states(
    model: HybridModel, groups: Sequence[TokenizedGroup]
) -> Float[np.ndarray, "responses hidden"]:
    return last_states(model, some_responses(groups, MAX_STATES, seed=SEED))


def _base_states(path: str | Path, trained: ScoredModel) -> Float[np.ndarray, "responses hidden"]:
    """The base model's states of the same ids; raises ModelError for one of another shape."""
    log.info("hidden states of %s", path)
    model = load_policy(path, dtype="auto", device=None)
    config = model.backbone.config
    size, vocabulary = hidden_size(config), config.get_text_config().vocab_size
    groups = trained.tokenized
    # the base is run on the trained model's ids, so both must have one vocabulary
    largest = max(int(ids.max()) for g in groups for ids in (g.prompt_ids, *g.response_ids))
    if size != trained.states.shape[1] or largest >= vocabulary:
        raise ModelError(
            f"the base model {path} has hidden size {size} and a vocabulary of {vocabulary}, which do not "
            f"fit {trained.name} (hidden size {trained.states.shape[1]}, ids up to {largest}); give the "
            "checkpoint that it was trained from (--base)"
        )
    return _states(model, groups)


def find_policies(models: Mapping[str, Heads], base: Path | None) -> dict[str, Path]:
    """The policies that would write, by name; the first of `models` is the one that is diagnosed.

    Raises ConfigError if that one lacks a head, or there is no other policy to compare with.
    """
    own, *_ = models.values()
    policies = {name: heads.policy for name, heads in models.items() if heads.policy is not None}
    if own.reward is None or own.policy is None:
        raise ConfigError(
            "--generate needs a model with a reward head and a policy (a run of method haf, or --policy)"
        )
    if base is not None:
        policies[BASE] = base
    if len(policies) < 2:
        raise ConfigError(
            "--generate needs a second policy to compare with: give the base model (--base), or "
            "another run with a policy (--also)"
        )
    return policies


def prefer_own_policy(
    models: Mapping[str, Heads],
    base: Path | None,
    groups: Sequence[Group],
    num: int,
    options: LoadOptions,
    on_progress: OnProgress = no_progress,
) -> OwnPolicyPreference:
    """All policies' continuations of `num` prompts, scored by all reward heads.

    Raises ConfigError as `find_policies` does, DataError if no prompt leaves room to write.
    """
    policies = find_policies(models, base)
    own = next(iter(policies.values()))
    encoders = {
        # the base model writes with the tokenizer and template of the model that came from it
        name: _load_encoder(path, own if name == BASE else path, options.max_length)
        for name, path in policies.items()
    }
    limit = min(encoder.lengths.max_length for encoder in encoders.values())
    sampling = Sampling(max_new_tokens=min(MAX_NEW_TOKENS, limit // 2))
    room = limit - sampling.max_new_tokens
    prompts = _draw_prompts(groups, num, encoders[next(iter(policies))], room)
    done = over_passes(on_progress, len(prompts) * len(policies))
    written = {n: _write(policies[n], encoders[n], prompts, sampling, done) for n in policies}
    texts = {name: [c.text for c in some] for name, some in written.items()}
    lengths = {name: np.array([c.num_tokens for c in some]) for name, some in written.items()}
    preferences: list[RewardPreference] = []
    for name, heads in models.items():
        if heads.reward is not None:
            rewards = _rewards(heads, prompts, texts, options)
            preferences += reward_preferences(name, rewards, lengths)
    return OwnPolicyPreference(
        num_prompts=len(prompts),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=SEED,
        policies=tuple(policy_text(name, some) for name, some in written.items()),
        preferences=tuple(preferences),
        examples=tuple(
            {"prompt": prompt_text(group.prompt)} | {n: cut_text(t[i]) for n, t in texts.items()}
            for i, group in enumerate(prompts[:NUM_CONTINUATIONS])
        ),
    )


def _load_encoder(path: Path, tokenizer: Path, max_length: int | None) -> Encoder:
    config = load_config(path)
    encoder: Encoder = load_encoder(tokenizer, config, max_length)
    vocabulary = config.get_text_config().vocab_size
    if len(encoder.tokenizer) > vocabulary:
        raise ModelError(
            f"{path} has a vocabulary of {vocabulary} tokens, too few for the tokenizer in "
            f"{tokenizer}; give the checkpoint that the policy was trained from (--base)"
        )
    return encoder


def _write(
    path: Path, encoder: Encoder, groups: Sequence[Group], sampling: Sampling, done: OnProgress
) -> list[Continuation]:
    """A continuation of each prompt; the policy is in memory only here."""
    log.info("generating with %s", path)
    model = load_causal_lm(path, dtype="auto", device=None)
    prompts = [group.prompt_ids.tolist() for group in encoder.encode(groups)[0]]
    eos = encoder.eos_id
    pad = eos if encoder.pad_id is None else encoder.pad_id
    written = sample(model, prompts, 1, sampling, eos=eos, pad=pad, seed=SEED, on_progress=done)
    continuations = []
    for (ids,) in written:
        ended = eos in ids
        # a policy may write pad, which is no text
        own = [i for i in (ids[: ids.index(eos)] if ended else ids) if i != pad]
        text = str(encoder.tokenizer.decode(own, skip_special_tokens=True))
        continuations.append(Continuation(text, len(own), ended))
    return continuations


def _draw_prompts(groups: Sequence[Group], num: int, encoder: Encoder, room: int) -> list[Group]:
    """`num` groups with different prompts of at most `room` tokens, drawn with a fixed seed."""
    distinct = list({prompt_key(group.prompt): group for group in groups}.values())
    sizes = [len(group.prompt_ids) for group in encoder.encode(distinct)[0]]
    fitting = [group for group, size in zip(distinct, sizes, strict=True) if size <= room]
    if not fitting:
        raise DataError(
            f"no prompt has at most {room} tokens, which would leave room to write behind it; raise "
            "--max-length, or give other data"
        )
    if len(fitting) < num:
        log.warning("only %d different prompts leave room to write; all are used", len(fitting))
    # drawn at random, in the order of the data
    order = np.random.default_rng(SEED).permutation(len(fitting))[:num]
    return [fitting[i] for i in sorted(order)]


def _rewards(
    heads: Heads, prompts: Sequence[Group], texts: Mapping[str, list[str]], options: LoadOptions
) -> dict[str, NDArray[np.float64]]:
    """Each policy's rewards; all continuations of a prompt are scored together, equal ones once."""
    log.info("scoring generations with %s", heads.reward)
    scorer = load_head(heads, REWARD, options)
    distinct = [tuple(dict.fromkeys(written)) for written in zip(*texts.values(), strict=True)]
    groups = [Group(g.id, g.prompt, some) for g, some in zip(prompts, distinct, strict=True)]
    # one score for each distinct text, in the order of the groups
    scores = iter(scorer.score_encoded(scorer.encoder.encode(groups)[0]).tolist())
    by_text = [{text: next(scores) for text in some} for some in distinct]
    return {
        name: np.array([rewards[text] for rewards, text in zip(by_text, some, strict=True)])
        for name, some in texts.items()
    }
