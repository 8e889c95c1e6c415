"""The length policy: what is cut, on which side, when a prompt and its responses are too long.

Prompts lose their oldest tokens (but keep a BOS), responses their last ones (but keep the EOS).
Nothing is cut that fits, and nothing is dropped unless that was asked for. Knows lists of ids only.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from hafrm.errors import ConfigError


class Fitted(NamedTuple):
    """Ids that fit, and what it took to make them fit."""

    prompt: list[int]
    responses: list[list[int]]
    prompt_cut: bool = False
    responses_cut: int = 0


@dataclass(frozen=True, slots=True)
class LengthPolicy:
    """At most `max_length` tokens for a prompt with any one of its responses.

    When they exceed it, the prompt is cut to at least `max_prompt_length` tokens (None: half of
    max_length), or further up to what the longest response leaves; then the responses are cut.
    """

    max_length: int
    max_prompt_length: int | None = None
    too_long: Literal["cut", "drop"] = "cut"

    def __post_init__(self) -> None:
        if self.too_long not in ("cut", "drop"):
            raise ConfigError(f'data.too_long must be "cut" or "drop", got {self.too_long!r}.')
        # Two on each side: BOS and a token of the prompt, a token of the response and EOS.
        if not 2 <= self.prompt_share <= self.max_length - 2:
            raise ConfigError(
                "data.max_prompt_length must be between 2 and data.max_length - 2, got "
                f"{self.prompt_share} with max_length {self.max_length}: a prompt or a response would "
                "become empty. Raise data.max_length."
            )

    @property
    def prompt_share(self) -> int:
        """Tokens of a prompt that long responses cannot take away."""
        return self.max_length // 2 if self.max_prompt_length is None else self.max_prompt_length

    def fit(
        self, prompt: list[int], responses: list[list[int]], bos_id: int | None
    ) -> Fitted | None:
        """The ids cut to fit; None when they do not fit and are to be dropped."""
        longest = max(len(ids) for ids in responses)
        if len(prompt) + longest <= self.max_length:
            return Fitted(prompt, responses)
        if self.too_long == "drop":
            return None
        room = max(self.prompt_share, self.max_length - longest)
        prompt_cut = len(prompt) > room
        if prompt_cut:
            head = prompt[:1] if prompt[0] == bos_id else []
            prompt = head + prompt[len(prompt) - room + len(head) :]
        room = self.max_length - len(prompt)
        cut = [ids if len(ids) <= room else [*ids[: room - 1], ids[-1]] for ids in responses]
        return Fitted(prompt, cut, prompt_cut, sum(len(ids) > room for ids in responses))
