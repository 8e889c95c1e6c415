"""Reference log-probs: the frozen starting checkpoint, run once before training and cached on disk.

No second model is ever in memory. The cache holds (log-prob sum, token count) per response. Its key is
a digest of what the numbers depend on: weights, token ids (hence tokenizer, template, lengths and data)
and dtype. A changed key is another file, so nothing stale is ever read.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from hafrm.atomic import atomic_write
from hafrm.engine.model import HybridModel
from hafrm.preferences import TokenizedGroup
from hafrm.progress import OnProgress, no_progress
from hafrm.resumable import cache_folder
from hafrm.scoring.forward import first_responses
from hafrm.scoring.loading import model_digest
from hafrm.training import parallel
from hafrm.training.step_batches import ComparisonRef, References, step_groups

log = logging.getLogger("hafrm")

REFERENCE_TOKENS = 4  # times the token budget: this pass keeps nothing for a backward pass


def reference_cache_key(
    model: HybridModel,
    groups: Sequence[TokenizedGroup],
    autocast: torch.dtype | None,
    weights: str | None = None,
) -> str:
    """Content key over the backbone's and policy head's weights, all token ids, and the dtype.

    `weights` is the checkpoint's `weights_digest`; without it the weights in memory are hashed.
    """
    assert model.policy_head is not None
    dtypes = f"{autocast} {model.policy_head.weight.dtype}"
    digest = hashlib.sha256(repr((2, dtypes, model.transform, weights)).encode())
    for name, parameter in model.named_parameters() if weights is None else ():
        if not name.startswith("reward_head") and "lora_" not in name:
            digest.update(f"{name.replace('base_layer.', '')} {tuple(parameter.shape)}".encode())
            digest.update(_weight_bytes(parameter).data)
    for group in groups:
        for ids in (group.prompt_ids, *group.response_ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def weights_digest(path: str, model: HybridModel) -> str | None:
    """What identifies the weights that `model` was loaded from, without reading those in memory: the
    digest of a folder's files, or a hub id's commit. None for files other than safetensors."""
    if Path(path).is_dir():
        return model_digest(path) if any(Path(path).glob("*.safetensors")) else None
    commit = getattr(model.backbone.config, "_commit_hash", None)
    return f"{path}@{commit}" if commit else None


def reference_logps(
    model: HybridModel,
    groups: Sequence[TokenizedGroup],
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
    path: str | None = None,
    on_progress: OnProgress = no_progress,
) -> References:
    """The model's own log-probs of every response, from the cache or from one packed pass.

    Call it before the first step and before wrapping the model; every rank calls it and computes its
    part. Only the main rank reads the cache, since nodes may have one each. `path` is the checkpoint that
    the model still equals. The reward head is not used.
    """
    counts = np.array([len(ids) for group in groups for ids in group.response_ids])

    def look() -> tuple[Path, NDArray[np.float32] | None]:
        weights = None if path is None else weights_digest(path, model)
        key = reference_cache_key(model, groups, autocast, weights)
        file = cache_folder("reference") / f"{key}.safetensors"
        return file, _read(file, counts)

    file, logps = parallel.from_main(look)
    if logps is None:
        logps = parallel.score_on_all_ranks(
            model, groups, max_tokens=max_tokens, autocast=autocast, on_progress=on_progress
        ).logps
        assert logps is not None
        if parallel.is_main():
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, save({"logps": logps, "counts": counts}))
    return References(logps, first_responses(groups))


def references_of(  # noqa: PLR0913 - two sets, what is reached, and how the pass runs
    model: HybridModel,
    train: Sequence[TokenizedGroup],
    refs: Sequence[ComparisonRef],
    validation: Sequence[TokenizedGroup],
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
    path: str | None = None,
) -> tuple[References, References]:
    """`reference_logps` of the training and the validation groups, from one pass or one file.

    Of the training groups only the responses of `refs`, the comparisons that the run reaches, are
    computed. The others are NaN, so that a loss which read one would stop the run.
    """
    used = step_groups(train, refs)
    reached = [group.tokens for group in used]
    num_responses = sum(len(group.response_ids) for group in (*reached, *validation))
    log.info("reference log-probs of %d responses", num_responses)
    both = reference_logps(
        model, [*reached, *validation], max_tokens=max_tokens, autocast=autocast, path=path
    )
    first = first_responses(train)
    logps = np.full(sum(len(group.response_ids) for group in train), np.nan, np.float32)
    place = [first[group.group_index] + response for group in used for response in group.responses]
    cut = len(place)
    logps[np.array(place, np.int64)] = both.logps[:cut]
    return (
        References(logps, first),
        References(both.logps[cut:], both.first[len(reached) :] - cut),
    )


def _read(file: Path, counts: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """The cached sums, or None; a damaged file is computed again."""
    try:
        cached = load_file(file)
    except (FileNotFoundError, SafetensorError):
        return None
    logps: NDArray[np.float32] = cached["logps"]
    return logps if np.array_equal(cached["counts"], counts) else None


def _weight_bytes(parameter: torch.Tensor) -> NDArray[np.uint8]:
    flat = parameter.detach().cpu().contiguous().view(-1)  # no copy on a CPU
    raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return raw
