"""Token ids of whole data sets, kept on disk: the second run over the same data tokenises nothing.

The key covers everything that decides the ids: the encoder's fingerprint (tokenizer, template, lengths)
and all texts. What the ids do not depend on (margins, tags, names) is taken from the groups.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hafrm.atomic import atomic_write
from hafrm.data.encoding import Encoder, EncodingReport
from hafrm.preferences import Group, TokenizedGroup
from hafrm.resumable import cache_folder


def encode_cached(
    encoder: Encoder, groups: Sequence[Group]
) -> tuple[list[TokenizedGroup], EncodingReport]:
    """As encoder.encode, from the cache where the same texts were encoded before.

    Raises what encoder.encode raises. A damaged file is made again; its content is no loss.
    """
    file = cache_folder("encoded") / f"{_key(encoder, groups)}.safetensors"
    if (cached := _read(file, groups)) is not None:
        return cached
    encoded, report = encoder.encode(groups)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, _pack(groups, encoded, report))
    return encoded, report


def _key(encoder: Encoder, groups: Sequence[Group]) -> str:
    digest = hashlib.sha256(encoder.fingerprint.encode())
    for group in groups:
        texts = [[[m.role, m.content] for m in group.prompt], group.responses]
        digest.update(json.dumps(texts).encode())
        # Which comparisons become indistinct is counted in the report.
        digest.update(repr([(c.chosen, c.rejected) for c in group.comparisons]).encode())
    return digest.hexdigest()


def _pack(
    groups: Sequence[Group], encoded: Sequence[TokenizedGroup], report: EncodingReport
) -> bytes:
    """All ids end to end, the lengths to cut them by, and which groups were not dropped."""
    ids = [part for group in encoded for part in (group.prompt_ids, *group.response_ids)]
    arrays = {
        "ids": np.concatenate([np.zeros(0, np.int32), *ids]),
        "lengths": np.array([len(part) for part in ids], np.int64),
        "kept": np.array(_kept(groups, encoded), np.int64),
    }
    return save(arrays, metadata={"report": json.dumps(asdict(report))})


def _kept(groups: Sequence[Group], encoded: Sequence[TokenizedGroup]) -> list[int]:
    """Index of each encoded group among the groups; encoding keeps their order."""
    kept, left = [], iter(enumerate(groups))
    for group in encoded:
        kept.append(next(i for i, g in left if g.id == group.id))
    return kept


def _read(
    file: Path, groups: Sequence[Group]
) -> tuple[list[TokenizedGroup], EncodingReport] | None:
    """What was kept, put together with the groups it belongs to; None if there is nothing usable."""
    try:
        with safe_open(file, framework="numpy") as content:
            ids, lengths, kept = (content.get_tensor(n) for n in ("ids", "lengths", "kept"))
            report = EncodingReport(**json.loads(content.metadata()["report"]))
    except (FileNotFoundError, SafetensorError):
        return None
    ids.flags.writeable = False
    parts = iter(_cut(ids, lengths))
    encoded = []
    for index in kept.tolist():
        group = groups[index]
        prompt, *responses = (next(parts) for _ in range(1 + len(group.responses)))
        encoded.append(
            TokenizedGroup(
                prompt, tuple(responses), group.comparisons, group.id, group.source, group.tags
            )
        )
    return encoded, report


def _cut(ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    """Read-only views, one after another."""
    bounds = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    return [ids[start:end] for start, end in itertools.pairwise(bounds)]
