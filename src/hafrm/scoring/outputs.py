"""What a model gives a response: its reward, and its implicit reward, by name.

Both heads of a run answer from one forward pass; for the reward alone, it computes no log-probs.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hafrm.engine.model import HybridModel
from hafrm.errors import ModelError
from hafrm.preferences import TokenizedGroup
from hafrm.progress import OnProgress, no_progress
from hafrm.scoring.loading import Heads, find_heads, load_encoder, shared_reward_head
from hafrm.scoring.reward_model import PolicyModel, RewardModel, Scorer, read_implicit_rule

TOKENS = "tokens"  # each token's part of the implicit reward
_NEEDS = {"reward": "reward", "implicit": "policy", TOKENS: "policy"}  # the head of an output
OutputScores = dict[str, list[Any]]
"""Of one group, by output: a float per response; for TOKENS, a list of floats per response."""


def outputs_of(path: str | Path) -> tuple[str, ...]:
    """Every output that a model can give, including TOKENS."""
    heads = find_heads(path)
    return tuple(name for name, head in _NEEDS.items() if getattr(heads, head))


def heads_for(path: str | Path, names: Sequence[str]) -> Heads:
    """The heads of a model that these outputs need; ModelError if it lacks one."""
    if lacking := set(names) - set(own := outputs_of(path)):
        raise ModelError(f"{path} gives {', '.join(own)}, not {', '.join(sorted(lacking))}")
    heads, needed = find_heads(path), {_NEEDS[name] for name in names}
    return replace(heads, **dict.fromkeys(vars(heads).keys() - needed))


def model_files(heads: Heads) -> list[str | Path]:
    """The directories that determine the outputs of these heads."""
    reference = None if heads.policy is None else read_implicit_rule(heads.policy).reference
    return [part for part in (heads.reward, heads.policy, reference) if part is not None]


def join_heads(heads: Heads, policy: PolicyModel, max_length: int | None) -> RewardModel | None:
    """The reward model on the policy's backbone, whose forward then gives both; None if the two exports do
    not share a backbone."""
    assert heads.reward is not None
    config = policy.model.backbone.config
    encoder = load_encoder(heads.reward, config, max_length)
    encoder.lengths = policy.encoder.lengths
    # if pad is its EOS, the reward would be read at another token than the policy ends at
    if encoder.cache_key != policy.encoder.cache_key or encoder.pad_id == encoder.eos_id:
        return None
    head = shared_reward_head(heads.reward, policy.model)
    if head is None:
        return None
    policy.model.reward_head = head
    alone = HybridModel(policy.model.backbone, reward_head=head, sharing=policy.model.sharing)
    return RewardModel(alone, policy.encoder)


class ModelOutputs:
    """A model in memory, with the heads for the outputs that it was loaded for."""

    def __init__(self, path: str | Path, names: Sequence[str], **options: Any) -> None:
        """`options` are those of `RewardModel.from_pretrained`; ModelError for outputs it cannot give."""
        heads = heads_for(path, names)
        self.reward = self.policy = None
        if heads.policy is not None:
            self.policy = PolicyModel.from_pretrained(heads.policy, **options)
        if heads.reward is not None and self.policy is not None:
            self.reward = join_heads(heads, self.policy, options.get("max_length"))
            if self.reward is None:
                raise ModelError(
                    f"the reward model and the policy of {path} do not share a backbone and tokenizer, so "
                    "they cannot answer together: give the directory of one of them"
                )
        elif heads.reward is not None:
            self.reward = RewardModel.from_pretrained(heads.reward, **options)

    @property
    def scorer(self) -> Scorer:
        """The head that the model is used with."""
        scorer = self.reward or self.policy
        assert scorer is not None
        return scorer

    def score(
        self,
        groups: Sequence[TokenizedGroup],
        names: Sequence[str],
        on_progress: OnProgress = no_progress,
    ) -> list[OutputScores]:
        """The outputs called `names` of each group's responses; NumericsError if one is not finite."""
        values: dict[str, Any] = {}
        if set(names) <= {"reward"}:
            assert self.reward is not None
            values["reward"] = self.reward.score_encoded(groups, on_progress)
        else:
            assert self.policy is not None
            scores = self.policy.score_heads(groups, on_progress, per_token=TOKENS in names)
            values |= {"reward": scores.rewards, "implicit": scores.logps}
            if scores.token_logps is not None:
                values[TOKENS] = np.split(scores.token_logps, np.cumsum(scores.lengths)[:-1])
        rest = {name: (value.tolist() for value in values[name]) for name in names}
        sizes = [len(group.response_ids) for group in groups]
        return [{name: list(islice(rest[name], size)) for name in names} for size in sizes]
