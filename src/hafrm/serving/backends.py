"""The backends of `hafrm serve`: a model in this process, or another server that runs the forward.

Both encode conversations with the model's own tokenizer and template, so ids and lengths are always ours.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.data.encoding import Encoder
from hafrm.errors import DataError, ModelError, NumericsError
from hafrm.export.plain_model import GOLDEN, TOLERANCE, GoldenLine, read_golden
from hafrm.preferences import Group, TokenizedGroup
from hafrm.scoring.loading import find_heads, load_encoder, model_digest
from hafrm.scoring.model_files import load_config
from hafrm.scoring.outputs import ModelOutputs, OutputScores, heads_for, model_files, outputs_of
from hafrm.scoring.reward_model import as_messages, forward_options
from hafrm.serving.protocols import Conversation, Dialogue, Rendered, RequestError, ServerClient
from hafrm.serving.server_checks import half_tolerance, reward_spread


class ConversationEncoder:
    """Conversations in any form, as groups of token ids; nothing is cut."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.end = encoder, encoder.closing()
        limit = encoder.lengths.max_length
        self._too_long = f"longer than {limit:,} tokens, the limit; nothing is cut"
        # no text with more characters fits, and tokenizing one of several megabytes takes half a minute
        self._max_size = limit * max(map(len, encoder.tokenizer.get_vocab()))
        tokenizer = encoder.tokenizer
        self.end_text = str(tokenizer.decode(self.end, skip_special_tokens=False))
        self._bos = tokenizer.bos_token if encoder.opening() == tokenizer.bos_token_id else ""
        # the whole end first: if only its EOS were removed, the rest would not be recognised as an end
        trailing = self.end_text, tokenizer.pad_token, tokenizer.eos_token
        self._trailing = tuple(text for text in trailing if text)

    def encode(self, conversations: Sequence[Conversation]) -> list[TokenizedGroup]:
        """A group for each conversation; RequestError for one that is malformed, or above the limit."""
        dialogues: list[tuple[int, Group]] = []
        encoded: dict[int, TokenizedGroup] = {}
        for i, conversation in enumerate(conversations):
            item = self._as_rendered(conversation)
            try:
                if _size(item) > self._max_size:
                    raise DataError(self._too_long)
                if isinstance(item, Dialogue):
                    group = Group(str(i), as_messages(item.prompt), tuple(item.responses))
                    dialogues.append((i, group))
                else:
                    encoded[i] = self._split(self._ids(item))
            except DataError as error:
                raise RequestError(422, str(error), i) from error
        groups, report = self.encoder.encode([group for _, group in dialogues])
        encoded |= {int(group.id): group for group in groups}
        for k, (i, _) in enumerate(dialogues):
            if i not in encoded:
                raise RequestError(422, report.refused.get(k, self._too_long), i)
        return [encoded[i] for i in range(len(conversations))]

    def _as_rendered(self, item: Conversation) -> Conversation:
        if not (isinstance(item, Dialogue) and item.may_be_rendered):
            return item
        is_rendered = not item.prompt or self.encoder.has_control_tokens(item.prompt)
        return Rendered(item.prompt + item.responses[0], open=True) if is_rendered else item

    def _ids(self, item: Rendered | Sequence[int]) -> NDArray[np.int32]:
        if not isinstance(item, Rendered):
            return np.array(item, np.int64).astype(np.int32)
        text = item.text
        while item.open and text.endswith(self._trailing):
            text = text.removesuffix(next(filter(text.endswith, self._trailing)))
        text += self.end_text if item.open else ""
        # verl removes the template's BOS, because vLLM adds one
        text = text if text.startswith(self._bos) else self._bos + text
        try:
            ids = self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        except UnicodeEncodeError as error:
            raise DataError(f"the text holds a lone surrogate: {error}") from error
        return np.array(ids, np.int32)

    def _split(self, ids: NDArray[np.int32]) -> TokenizedGroup:
        # into prompt and response; the place of the split only affects what is shared
        if len(ids) > self.encoder.lengths.max_length:
            raise DataError(self._too_long)
        if len(ids) < 2 or int(ids.max()) >= (self.encoder.vocab_size or 2**31):
            raise DataError("fewer than two tokens, or ids beyond the model's vocabulary")
        if ids[len(ids) - len(self.end) :].tolist() != self.end:
            raise DataError(
                f"it does not end in {self.end_text!r}, as the model's chat template ends a conversation; "
                "render it with that template, or send messages"
            )
        at = self.encoder.last_turn(ids)
        return TokenizedGroup(ids[:at], (ids[at:],))


def _size(item: Conversation) -> int:
    """Approximate number of characters in the longest conversation of an item."""
    if isinstance(item, Dialogue):
        return len(str(item.prompt)) + max(map(len, item.responses))
    return len(item.text if isinstance(item, Rendered) else item)


class LocalBackend:
    """A model in this process, with all of its outputs."""

    def __init__(self, path: str | Path, **options: Any) -> None:
        """`options` are those of `ModelOutputs`."""
        names = outputs_of(path)
        self.model = ModelOutputs(path, names, too_long="drop", **options)
        self.names, self.encoder = names, self.model.scorer.encoder
        hybrid, heads = self.model.scorer.model, heads_for(path, names)
        self.golden = _golden(heads.reward)
        self.batch_tokens = 8 * int(forward_options(hybrid)["max_tokens"])
        dtype = next(hybrid.backbone.parameters()).dtype
        is_full = dtype.itemsize == 4
        self.tolerance = TOLERANCE if is_full else half_tolerance(reward_spread(self.golden))
        self.replay_every: float | None = None
        self.about = {"dtype": str(dtype).removeprefix("torch."), "device": str(hybrid.device)}
        self.about["weights"] = ", ".join(map(model_digest, model_files(heads)))
        self.score = self.model.score


class UpstreamBackend:
    """A running vLLM or SGLang server, which is asked for rewards by token ids."""

    def __init__(
        self, path: str | Path, url: str, api_key: str | None = None, max_length: int | None = None
    ) -> None:
        """Raises ModelError for a model without golden scores, which the server must reproduce."""
        directory = find_heads(path).reward
        if directory is None or not (golden := _golden(directory)):
            raise ModelError(
                f"{path} has no reward model with golden scores: no upstream can be proved"
            )
        self.golden, self.names = golden, ("reward",)
        self.tolerance = half_tolerance(reward_spread(golden))
        self.encoder = load_encoder(directory, load_config(directory), max_length, "drop")
        self.client = ServerClient(url, api_key)
        self._protocol: Any = None
        self._pool = ThreadPoolExecutor(16, "upstream")
        self.batch_tokens, self.replay_every = 2**18, 180.0
        self.about = {"upstream": self.client.base}

    def score(self, groups: Sequence[TokenizedGroup], _: Sequence[str]) -> list[OutputScores]:
        """The rewards of each group; ServerError if the server is down or answers in another form."""
        ids = [[*g.prompt_ids.tolist(), *r.tolist()] for g in groups for r in g.response_ids]
        if self._protocol is None:
            self._protocol = self.client.find_protocol(ids[:1])
        parts = [ids[i : i + 8] for i in range(0, len(ids), 8)]
        answers = self._pool.map(partial(self.client.rewards, self._protocol), parts)
        rewards = [reward for answer in answers for reward in answer]
        if not np.isfinite(rewards).all():
            raise NumericsError("the upstream gives a reward that is not finite")
        rest = iter(rewards)
        return [{"reward": list(islice(rest, len(group.response_ids)))} for group in groups]


Backend = LocalBackend | UpstreamBackend


def _golden(directory: Path | None) -> list[GoldenLine]:
    """The golden lines of a reward directory; none if it has no golden file."""
    return read_golden(directory) if directory and (directory / GOLDEN).is_file() else []
