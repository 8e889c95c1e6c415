"""Passes without gradients: the reference's log-probs before training, validation during it.

The reference is the frozen starting checkpoint. It is run once and its log-probs are cached on disk, so no
second model is ever in memory. Validation chooses the best step; full metrics are in `hafrm.evaluation`.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from hafrm.atomic import cache_folder, write_cache
from hafrm.data.store import Lazy, counts_of, join
from hafrm.engine.model import HybridModel
from hafrm.preferences import TokenizedGroup
from hafrm.progress import over_passes
from hafrm.scoring.forward import first_responses
from hafrm.scoring.loading import model_digest
from hafrm.statistics import effective_rank, spectrum, with_bounds
from hafrm.training import parallel
from hafrm.training.methods import Method
from hafrm.training.step_batches import (
    ComparisonRef,
    References,
    StepGroup,
    comparisons_by_group,
    step_group,
)

log = logging.getLogger("hafrm")

PART_TOKENS = 2**19
"""Of one reference pass, which fills one file: some minutes on a CPU, seconds on a GPU."""
NUM_STATES = 256  # validation responses whose hidden states are measured
NUM_PROBES = 64  # validation prompts that are also scored with one repeated token


def pass_tokens(budget: int) -> int:
    """Tokens per sequence in the reference pass and in validation, which keep nothing for a backward."""
    # beyond this, matrix products become no more efficient; a row of a long pair is large as it is
    return max(budget, min(4 * budget, 2**15))


def reference_weights(model: HybridModel, path: str | None) -> str | None:
    """What identifies the weights of a model that equals the checkpoint at `path`: a digest of the files
    there, or the commit on the hub. None if nothing does."""
    if path is None or not Path(path).is_dir():
        return None if path is None else getattr(model.backbone.config, "_commit_hash", None)
    return model_digest(path) if any(Path(path).glob("*.safetensors")) else None


def reference_file(
    model: HybridModel,
    groups: Sequence[TokenizedGroup],
    autocast: torch.dtype | None,
    weights: str | None,
) -> Path | None:
    """The file of these log-probs, named by `reference_weights`, token ids (hence template, lengths, data)
    and dtype; None if nothing identifies the weights."""
    if weights is None:
        return None
    assert model.policy_head is not None
    dtypes = f"{autocast} {model.policy_head.weight.dtype}"
    if any(p.dtype == torch.uint8 for p in model.parameters()):
        dtypes += " nf4"
    digest = hashlib.sha256(repr((2, dtypes, model.transform, weights)).encode())
    for group in groups:
        for ids in (group.prompt_ids, *group.response_ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
        digest.update(b"|")
    return cache_folder("reference") / f"{digest.hexdigest()}.safetensors"


def reference_logps(
    model: HybridModel,
    groups: Sequence[TokenizedGroup],
    *,
    path: str | None = None,
    **options: Any,
) -> References:
    """The model's own log-probs of every response, from the cache or from packed passes of all ranks. Call
    it before the model is wrapped. Each pass leaves a file, which a killed run finds again. `path` is the
    checkpoint that the model still equals; None: cache nothing. `options` are those of `run_forward`."""
    sizes = np.fromiter((group.num_tokens for group in groups), np.int64, len(groups))
    starts = np.flatnonzero(np.diff(np.cumsum(sizes) // PART_TOKENS, prepend=-1)).tolist()
    # no part is kept: the groups may be on disk
    parts = [slice(*ends) for ends in pairwise([*starts, len(groups)])]
    first = first_responses(groups)
    counts = counts_of(groups, "responses")

    def read_cache() -> list[tuple[Path | None, NDArray[np.float32] | None]]:
        weights, cached = reference_weights(model, path), []
        for part in map(groups.__getitem__, parts):
            file, logps = reference_file(model, part, options.get("autocast"), weights), None
            # a damaged file is recomputed
            with suppress(OSError, SafetensorError, KeyError):
                logps = None if file is None else load_file(file)["logps"]
            cached.append((file, logps))
        return cached

    # Only the main rank reads: each node may have its own cache, and all must do the same.
    files = parallel.from_main(read_cache)
    todo = sum(counts[p].sum() for p, (_, known) in zip(parts, files, strict=True) if known is None)
    of_parts = [np.empty(0, np.float32)]
    with parallel.progress_of_main("reference log-probs") as on_progress:
        done = over_passes(on_progress, int(todo))
        for part, (file, cached) in zip(parts, files, strict=True):
            logps = cached
            if logps is None:
                own = list(groups[part])
                logps = parallel.score_on_all_ranks(model, own, on_progress=done, **options).logps
                assert logps is not None
                if file is not None and parallel.is_main():
                    write_cache(file, save({"logps": logps}))
            of_parts.append(logps)
    return References(np.concatenate(of_parts), first)


def references_of(
    model: HybridModel,
    train: Sequence[TokenizedGroup],
    refs: Sequence[ComparisonRef],
    validation: Sequence[TokenizedGroup],
    **options: Any,
) -> tuple[References, References]:
    """`reference_logps` of the training and the validation groups, from one pass or one file; for training
    groups, only responses in `refs`, the comparisons that the run reaches."""
    by_group = [*comparisons_by_group(refs).items()]
    used: Sequence[StepGroup] = Lazy(lambda i: step_group(train, *by_group[i]), len(by_group))
    if not isinstance(train, Lazy):
        used = [*used]
    tokens: Sequence[TokenizedGroup] = Lazy(lambda i: used[i].tokens, len(used))
    groups = join([tokens, validation])
    log.info("reference log-probs of %d responses", counts_of(groups, "responses").sum())
    both = reference_logps(model, groups, **options)
    first = first_responses(train)
    # NaN if not computed: a loss that read one would stop the run
    logps = np.full(counts_of(train, "responses").sum(), np.nan, np.float32)
    places = (first[group.group_index] + response for group in used for response in group.responses)
    place = np.fromiter(places, np.int64)
    cut = len(place)
    logps[place] = both.logps[:cut]
    return References(logps, first), References(both.logps[cut:], both.first[len(used) :] - cut)


@dataclass(frozen=True)
class HeadScores:
    """The heads' scores of every response; None for a head that the method does not train."""

    rewards: NDArray[np.float32] | None
    implicit: NDArray[np.float32] | None  # the policy's implicit reward, as the method defines it
    lengths: NDArray[np.int64]  # tokens of each response, EOS included
    first: NDArray[np.int64]  # index of each group's first response


def score_heads(
    model: HybridModel,
    groups: Sequence[TokenizedGroup],
    references: NDArray[np.float32] | None,
    method: Method | None,
    **options: Any,
) -> HeadScores:
    """Both heads' scores, from one pass of all ranks; `references` are reference log-probs. Without a
    `method`, only the rewards."""
    training = model.training
    model.eval()
    scores = parallel.score_on_all_ranks(model, groups, **options)
    model.train(training)
    implicit = None
    if method is not None and scores.logps is not None:
        implicit = method.implicit_rewards(
            torch.from_numpy(scores.logps),
            torch.from_numpy(scores.lengths),
            None if references is None else torch.from_numpy(references),
        ).numpy()
    return HeadScores(scores.rewards, implicit, scores.lengths, scores.first)


def validate(
    groups: Sequence[TokenizedGroup], scores: HeadScores, method: Method
) -> dict[str, float]:
    """`accuracy` and `loss` (mean -log sigmoid(margin), nat) of the score that the method ranks with, over
    decided comparisons; `_low`, `_high`: a 95 % interval with a prompt's comparisons as one trial."""
    heads = {"reward": scores.rewards, "implicit": scores.implicit}
    values_of = {name: values for name, values in heads.items() if values is not None}
    margins = {n: decided_margins(groups, v, scores.first) for n, v in values_of.items()}
    ranked = margins[method.scores_with]
    num_prompts = sum(any(c.is_decided for c in group.comparisons) for group in groups)
    result = {
        **with_bounds("accuracy", float((ranked > 0).mean()), num_prompts),
        "loss": float(np.logaddexp(0.0, -ranked).mean()),
        "margin": float(ranked.mean()),
    }
    if len(margins) == 2:
        implicit_accuracy = float((margins["implicit"] > 0).mean())
        result |= with_bounds("implicit_accuracy", implicit_accuracy, num_prompts)
    return result


@contextmanager
def state_spread(model: HybridModel) -> Iterator[dict[str, float]]:
    """In its `with` block, measures the states that this rank's reward head reads, on about NUM_STATES
    responses: `effective_rank` (0: all equal) and `norm_spread`, the standard deviation of their norms
    divided by the mean. Stays empty without a reward head."""
    values: dict[str, float] = {}
    states: list[NDArray[np.float32]] = []

    def keep(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if sum(map(len, states)) < NUM_STATES:
            states.append(inputs[0].cpu().numpy())

    head = model.reward_head
    with nullcontext() if head is None else head.register_forward_pre_hook(keep):
        yield values
    if states:
        together = np.concatenate(states)
        rank, norms = effective_rank(spectrum(together)), np.linalg.norm(together, axis=1)
        values["effective_rank"] = 0.0 if math.isnan(rank) else rank
        values["norm_spread"] = float(norms.std() / norms.mean())


def repeated_wins(
    model: HybridModel, groups: Sequence[TokenizedGroup], scores: HeadScores, **options: Any
) -> dict[str, float]:
    """In what fraction of some groups one token of the chosen response, repeated to its length, gets more
    reward than the response, a hack that RLHF finds; empty without a reward head."""
    if scores.rewards is None:
        return {}
    compared = ((i, g.comparisons[0].chosen) for i, g in enumerate(groups) if g.comparisons)
    chosen, probes = list(islice(compared, NUM_PROBES)), []
    for i, response in chosen:
        ids = groups[i].response_ids[response].copy()
        ids[:-1] = ids[len(ids) // 2 - 1]
        probes.append(replace(groups[i], response_ids=(ids,), comparisons=()))
    repeated = score_heads(model, probes, None, None, **options).rewards
    own = scores.rewards[[scores.first[i] + response for i, response in chosen]]
    assert repeated is not None
    return with_bounds("repeated_wins", float((repeated > own).mean()), len(probes))


def decided_margins(
    groups: Sequence[TokenizedGroup], values: NDArray[np.floating[Any]], first: NDArray[np.int64]
) -> NDArray[np.float64]:
    """value(chosen) - value(rejected) of every comparison that is decided."""
    sides = [
        (start + c.chosen, start + c.rejected)
        for group, start in zip(groups, first, strict=True)
        for c in group.comparisons
        if c.is_decided
    ]
    chosen, rejected = np.array(sides).T
    exact = values.astype(np.float64)
    margins: NDArray[np.float64] = exact[chosen] - exact[rejected]
    return margins
