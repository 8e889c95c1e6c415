"""Policies write, reward models judge: runs what `consistency` counts."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hafrm.data.encoding import Encoder
from hafrm.data.groups import Group, prompt_key
from hafrm.engine.sampling import Sampling
from hafrm.errors import ConfigError, DataError, ModelError
from hafrm.evaluation.diagnostics.consistency import Consistency, policy_text, wins
from hafrm.evaluation.diagnostics.generations import SEED, Generation, generate
from hafrm.evaluation.diagnostics.worst import cut_text, shown_prompt
from hafrm.evaluation.evaluate import Heads
from hafrm.scoring.loading import AUTO, Placement, load_causal_lm, load_config, load_encoder
from hafrm.scoring.scorer import RewardModel

log = logging.getLogger("hafrm")

BASE = "base model"
MAX_NEW_TOKENS = 128
"""Of a continuation, where the models take as many."""
NUM_EXAMPLES = 3


def writing_policies(models: Mapping[str, Heads], base: Path | None) -> dict[str, Path]:
    """The policies that would write, by name; `models` are heads by name, the model in question first.

    Raises ConfigError where that one lacks a head, or there is no other policy to compare with.
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


def consistency(  # noqa: PLR0913 - the verb and its options
    models: Mapping[str, Heads],
    base: Path | None,
    groups: Sequence[Group],
    num: int,
    *,
    max_length: int | None = None,
    place: Placement = AUTO,
    done: Callable[[int, int], None] | None = None,
) -> Consistency:
    """The generations of all models' policies and of the base model in the eyes of all reward heads.

    Raises ConfigError as `writing_policies` does, DataError for prompts that leave no room to write.
    """
    policies = writing_policies(models, base)
    own = next(iter(policies.values()))
    writers = {
        name: _Writer(path, own if name == BASE else path, max_length, place)
        for name, path in policies.items()
    }
    limit = min(writer.encoder.lengths.max_length for writer in writers.values())
    sampling = Sampling(max_new_tokens=min(MAX_NEW_TOKENS, limit // 2))
    prompts = _draw(groups, num, next(iter(writers.values())), limit - sampling.max_new_tokens)
    written = {name: writer.write(prompts, sampling, done) for name, writer in writers.items()}
    options = place.options(max_length)
    texts = {name: writers[name].texts(each) for name, each in written.items()}
    lengths = {n: np.array([len(w.ids) for w in each]) for n, each in written.items()}
    return Consistency(
        num_prompts=len(prompts),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=SEED,
        policies=tuple(policy_text(name, each) for name, each in written.items()),
        wins=tuple(
            win
            for name, heads in models.items()
            if heads.reward is not None
            for win in wins(name, _rewards(heads.reward, prompts, texts, options), lengths)
        ),
        examples=tuple(
            {"prompt": shown_prompt(group.prompt)} | {n: cut_text(t[i]) for n, t in texts.items()}
            for i, group in enumerate(prompts[:NUM_EXAMPLES])
        ),
    )


class _Writer:
    """A policy, and the tokenizer and template that its prompts are encoded with.

    Its weights are in memory only while it writes.
    """

    def __init__(
        self, path: Path, tokenizer: Path, max_length: int | None, place: Placement
    ) -> None:
        self.path, self.place = path, place
        config = load_config(path)
        self.encoder: Encoder = load_encoder(tokenizer, config, max_length)
        vocabulary = config.get_text_config().vocab_size
        if len(self.encoder.tokenizer) > vocabulary:
            raise ModelError(
                f"{path} has a vocabulary of {vocabulary} tokens, too few for the tokenizer in "
                f"{tokenizer}; give the checkpoint that the policy was trained from (--base)"
            )

    def prompt_ids(self, groups: Sequence[Group]) -> list[NDArray[np.int32]]:
        return [group.prompt_ids for group in self.encoder.encode(groups)[0]]

    def write(
        self,
        groups: Sequence[Group],
        sampling: Sampling,
        done: Callable[[int, int], None] | None,
    ) -> list[Generation]:
        log.info("generating with %s", self.path)
        eos, pad = self.encoder.eos_id, self.encoder.pad_id
        return generate(
            load_causal_lm(self.path, dtype=self.place.dtype, device=self.place.device),
            self.prompt_ids(groups),
            sampling,
            eos=eos,
            pad=eos if pad is None else pad,
            done=done,
        )

    def texts(self, written: Sequence[Generation]) -> list[str]:
        decode = self.encoder.tokenizer.decode
        return [str(decode(list(each.ids), skip_special_tokens=True)) for each in written]


def _draw(groups: Sequence[Group], num: int, writer: _Writer, room: int) -> list[Group]:
    """`num` groups with different prompts of at most `room` tokens, drawn with a fixed seed."""
    distinct = list({prompt_key(group.prompt): group for group in groups}.values())
    sizes = [len(ids) for ids in writer.prompt_ids(distinct)]
    fitting = [group for group, size in zip(distinct, sizes, strict=True) if size <= room]
    if not fitting:
        raise DataError(
            f"no prompt has at most {room} tokens, which would leave room to write behind it; raise "
            "--max-length, or give other data"
        )
    if len(fitting) < num:
        log.warning("only %d different prompts leave room to write; all are used", len(fitting))
    order = np.random.default_rng(SEED).permutation(len(fitting))[:num]
    return [fitting[i] for i in sorted(order)]


def _rewards(
    path: Path,
    prompts: Sequence[Group],
    texts: Mapping[str, list[str]],
    options: dict[str, Any],
) -> dict[str, NDArray[np.float64]]:
    """Each policy's rewards; all continuations of a prompt are laid out together, equal ones once."""
    log.info("judging generations with %s", path)
    model = RewardModel.from_pretrained(path, **options)
    written = [dict.fromkeys(each) for each in zip(*texts.values(), strict=True)]
    groups = [
        Group(group.id, group.prompt, tuple(each))
        for group, each in zip(prompts, written, strict=True)
    ]
    scores = iter(model.score_encoded(model.encoder.encode(groups)[0]).tolist())
    known = [{text: next(scores) for text in each} for each in written]
    return {
        name: np.array([rewards[text] for rewards, text in zip(known, each, strict=True)])
        for name, each in texts.items()
    }
