"""Where the stock sequence classifier reads its reward: at the last token that is not pad."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hafrm.engine.layout import Branches
from hafrm.errors import DataError
from hafrm.preferences import TokenizedGroup


class _Ids(NamedTuple):
    prompt_ids: NDArray[np.int32]
    response_ids: tuple[NDArray[np.int32], ...]


def without_pad_at_the_end(group: TokenizedGroup, pad: int | None) -> Branches:
    """The group as the stock classifier pools it: at the last token that is not pad.

    Nothing changes unless pad is the EOS, as in some models of others; those were trained so.
    """
    if pad is None or all(ids[-1] != pad for ids in group.response_ids):
        return group
    kept = tuple(ids[: np.flatnonzero(np.append(-1, ids) != pad)[-1]] for ids in group.response_ids)
    if any(len(ids) == 0 for ids in kept):
        raise DataError(
            f"a response of group {group.id!r} holds nothing but the pad token, behind which this "
            "model reads no reward; leave the response out"
        )
    return _Ids(group.prompt_ids, kept)
