"""Reference log-probs: the frozen starting checkpoint, run once before training and cached on disk.

No second model is ever in memory. The cache holds (log-prob sum, token count) per response and is keyed
by what the numbers depend on: weights, token ids (hence tokenizer, template, lengths and data) and
dtype. A changed key is another file, so nothing stale is ever read.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from hafrm.atomic import atomic_write
from hafrm.engine.model import HybridModel
from hafrm.preferences import TokenizedGroup
from hafrm.resumable import cache_folder
from hafrm.scoring.forward import first_responses, run_forward
from hafrm.training import parallel
from hafrm.training.batches import References

log = logging.getLogger("hafrm")

REFERENCE_TOKENS = 4
"""Times the token budget that this pass, which keeps nothing for a backward pass, takes at once."""


def reference_key(
    model: HybridModel, groups: Sequence[TokenizedGroup], autocast: torch.dtype | None
) -> str:
    """Content key over the backbone's and policy head's weights, all token ids, and the dtype."""
    digest = hashlib.sha256(repr((1, str(autocast), model.transform)).encode())
    for name, parameter in model.named_parameters():
        if not name.startswith("reward_head") and "lora_" not in name:
            digest.update(f"{name.replace('base_layer.', '')} {tuple(parameter.shape)}".encode())
            digest.update(_bytes(parameter).data)
    for group in groups:
        for ids in (group.prompt_ids, *group.response_ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def reference_logps(
    model: HybridModel,
    groups: Sequence[TokenizedGroup],
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
    done: Callable[[int, int], None] | None = None,
) -> References:
    """The model's own log-probs of every response, from the cache or from one packed pass.

    Call it before the first step and before wrapping the model; every rank calls it and computes its
    share. The reward head takes no part.
    """
    file = cache_folder("reference") / f"{reference_key(model, groups, autocast)}.safetensors"
    first = first_responses(groups)
    counts = np.array([len(ids) for group in groups for ids in group.response_ids])
    if (cached := _read(file, counts)) is not None:
        return References(cached, first)
    rank, size = _place()
    share = range(rank, len(groups), size)
    scores = run_forward(
        model, [groups[i] for i in share], max_tokens=max_tokens, autocast=autocast, done=done
    )
    assert scores.logps is not None
    logps = np.zeros(len(counts), np.float32)
    for i, start in zip(share, scores.first, strict=True):
        number = len(groups[i].response_ids)
        logps[first[i] : first[i] + number] = scores.logps[start : start + number]
    logps = parallel.add_up(torch.from_numpy(logps).to(model.device)).cpu().numpy()
    if rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, save({"logps": logps, "counts": counts}))
    parallel.wait()
    return References(logps, first)


def references_of(
    model: HybridModel,
    train: Sequence[TokenizedGroup],
    validation: Sequence[TokenizedGroup],
    *,
    max_tokens: int,
    autocast: torch.dtype | None = None,
) -> tuple[References, References]:
    """`reference_logps` of the training and the validation groups, from one pass or one file."""
    log.info("reference log-probs of %d groups", len(train) + len(validation))
    both = reference_logps(model, [*train, *validation], max_tokens=max_tokens, autocast=autocast)
    cut = len(train)
    split = both.first[cut]
    return (
        References(both.logps[:split], both.first[:cut]),
        References(both.logps[split:], both.first[cut:] - split),
    )


def _read(file: Path, counts: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """The cached sums, or None; a damaged file is computed again, its content being no loss."""
    try:
        cached = load_file(file)
    except (FileNotFoundError, SafetensorError):
        return None
    logps: NDArray[np.float32] = cached["logps"]
    return logps if np.array_equal(cached["counts"], counts) else None


def _place() -> tuple[int, int]:
    ranks = torch.distributed
    return (ranks.get_rank(), ranks.get_world_size()) if ranks.is_initialized() else (0, 1)


def _bytes(parameter: torch.Tensor) -> NDArray[np.uint8]:
    """The weights as they lie in memory; no copy on a CPU."""
    flat = parameter.detach().cpu().contiguous().view(-1)
    raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return raw
