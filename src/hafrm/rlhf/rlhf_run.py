"""What all RLHF runs share, whatever the algorithm: policy, prompts, rewards, log, the best step.

An algorithm passes a batch's numbers to `log_batch`, and `evaluate` decides when a step is the best so far
and when to stop. Reward models get text, so policy and reward model may have different tokenizers.
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.atomic import atomic_directory
from hafrm.best_of_n.candidate_scores import GoldReward
from hafrm.best_of_n.candidates import read_prompts
from hafrm.best_of_n.judges import conversation_text
from hafrm.data.encoding import Encoder
from hafrm.data.reader import file_digests
from hafrm.data.splits import split_by_prompt, without_prompts
from hafrm.errors import DataError
from hafrm.evaluation.heads import EvaluationOptions, load_main_head
from hafrm.export.proof import PLAIN, check_policy, prove, score_in_memory
from hafrm.export.stock_export import export_policy
from hafrm.preferences import Group, TokenizedGroup
from hafrm.progress import OnProgress, no_progress
from hafrm.results import write_result
from hafrm.rlhf.actor import Actor, Prompt, Rollout, encode_prompts
from hafrm.rlhf.rlhf_recipe import PromptSection, RlhfRecipe
from hafrm.run_folder import RunFolder
from hafrm.scoring.loading import check_base, load_tokenizer
from hafrm.scoring.outputs import ModelOutputs, heads_for, model_files
from hafrm.scoring.reward_model import PolicyModel, Scorer
from hafrm.statistics import clustered_bootstrap
from hafrm.training.checkpoint import model_digests
from hafrm.training.loop import MetricsLog

log = logging.getLogger("hafrm")

Responses = Float[np.ndarray, " responses"]
Measure = Literal["gold", "independent", "penalised"]
"""What selects a step: the gold reward, evaluation.reward_model's, or the reward minus a KL penalty."""
BOTH = ("reward", "implicit")  # the columns of two rewards
WINDOW = 4  # evaluations over which to look for a fall of the held-out measure
LONGEST = 2**20  # tokens above which an encoder would cut: no prompt is cut, long ones are left out
_UNTRAINED: tuple[Measure, ...] = ("gold", "independent")
NUM_SAMPLES = 4  # held-out responses written down at each evaluation
_SPLIT_SEED = 2**33  # beyond the seeds of other splits, so that no part contains another
_HELD_OUT_SEED = 2**60  # beyond the seeds of all batches


class _BothRewards(PolicyModel):
    """A scorer whose scores are pairs (reward, implicit reward), both from one forward."""

    def score_encoded(
        self, encoded: Sequence[TokenizedGroup], on_progress: OnProgress = no_progress
    ) -> NDArray[np.float32]:
        scores: Any = self.score_heads(encoded, on_progress)
        return np.stack([scores.rewards, scores.logps], axis=1)


def load_rewards(path: str, implicit_weight: float) -> Scorer:
    """The main head of a reward model, or both heads if the implicit reward counts too."""
    if not implicit_weight:
        return load_main_head(path, EvaluationOptions())
    policy: Any = ModelOutputs(path, BOTH).policy
    return _BothRewards(policy.model, policy.encoder, policy.reference, policy.rule)


def by_name(rewards: NDArray[np.float32]) -> dict[str, Responses]:
    """The rewards of responses (one or two per response), by name."""
    return dict(zip(BOTH, rewards.reshape(len(rewards), -1).T, strict=False))


def score_texts(
    scorer: Scorer, prompts: Sequence[Any], texts: Sequence[Sequence[str]]
) -> tuple[NDArray[np.float32], int]:
    """(the reward of every response, prompt by prompt; how many texts were cut to the model's length)."""
    # a reward model's limit may be shorter than responses, and one long response must not end a run
    rewards, num_cut = scorer.score_batch_cut(prompts, texts)
    if num_cut:
        what = "prompts or responses exceed the %d tokens that the reward model takes"
        log.warning(f"%d {what}, and are scored cut", num_cut, scorer.encoder.lengths.max_length)
    return np.array([reward for own in rewards for reward in own], np.float32), num_cut


def score_rollouts(scorer: Scorer, rollouts: Sequence[Rollout]) -> NDArray[np.float32]:
    """The reward of every response, prompt by prompt; responses that are too long are cut."""
    messages = [r.prompt.messages for r in rollouts]
    return score_texts(scorer, messages, [r.texts for r in rollouts])[0]


def select_measure(
    rewards: Mapping[str, Responses], kls: Responses, kl_penalty: float
) -> tuple[Measure, Responses]:
    """The measure that selects the best step, and its value for each prompt."""
    for name in _UNTRAINED:
        if name in rewards:
            return name, rewards[name]
    # a KL is never negative: a mean below 0 is noise, and is no advantage for a step
    floored = kls if kls.mean() > 0 else np.zeros_like(kls)
    return "penalised", rewards["reward"] - kl_penalty * floored


def reward_hacking(history: Sequence[tuple[float, Sequence[float]]]) -> str | None:
    """Why to stop after the last of the evaluations (mean reward, other measure per prompt), or None.

    Reward hacking: over WINDOW evaluations the reward that is trained on has risen on held-out prompts, and
    a measure that is not trained on has fallen by more than two standard errors, prompt by prompt.
    """
    if len(history) < WINDOW or len(history[0][1]) < 2:  # one prompt has no standard error
        return None
    (reward_then, then), (reward_now, now) = history[-WINDOW], history[-1]
    change = np.array(now) - np.array(then)
    error = float(change.std(ddof=1)) / len(change) ** 0.5
    if reward_now <= reward_then or float(change.mean()) >= -2.0 * error:
        return None
    return (
        f"reward hacking: over {WINDOW} evaluations the held-out reward rose from {reward_then:.3f} to "
        f"{reward_now:.3f} while the measure that selects steps fell by {-change.mean():.3f} (error "
        f"{error:.3f}): raise algorithm.kl_coefficient, or take another reward model"
    )


@dataclass
class RlhfResult:
    """The progress of a run, stored in its checkpoints; at the end, its result."""

    num_steps: int = 0  # batches taken; fewer than requested if the run was stopped
    best_step: int = -1
    best_score: float = float("-inf")
    best: dict[str, float] = field(default_factory=dict)  # held-out means of the best step
    selected_by: Measure = "penalised"  # the measure that selected it
    stopped: str | None = None  # why the run ended early
    num_high_kl: int = 0  # batches in a row above watch.max_kl
    num_cut: int = 0  # prompts and responses of batches that were too long for the reward model
    history: list[tuple[float, list[float]]] = field(default_factory=list)
    """Of the last evaluations: the mean reward, and per prompt the measure that is not trained on."""


class RlhfRun:
    """One run in one process."""

    def __init__(
        self, recipe: RlhfRecipe, folder: RunFolder, gold: GoldReward | None, *, share: bool = True
    ) -> None:
        """Load everything that the recipe names; `share` False leaves the policy's attention unchanged."""
        self.recipe, self.folder, self.gold = recipe, folder, gold
        check_base(recipe.model)
        encoder = Encoder(load_tokenizer(recipe.model), max_length=LONGEST)
        self.train_prompts, self.held_out_prompts = load_prompts(
            recipe.data, encoder, recipe.training.seed, folder
        )
        assert recipe.reward.model is not None
        self.reward_model = load_rewards(recipe.reward.model, recipe.reward.implicit_weight)
        self.actor = Actor.load(recipe, encoder, share=share)
        path = recipe.evaluation.reward_model
        self.independent = None if path is None else load_main_head(path, EvaluationOptions())
        self.train_prompts, self.held_out_prompts = (
            self._scorable(prompts) for prompts in (self.train_prompts, self.held_out_prompts)
        )
        self.log = MetricsLog(folder, recipe, recipe.training.steps)
        self.result = RlhfResult()
        self.last_kl = 0.0  # of the latest evaluation, nat per response
        self.batches: list[Mapping[str, float]] = []
        """What `log_batch` has not written yet; it is stored in checkpoints."""
        self._seconds: list[float] = []  # of these batches, if this process took them
        self._since = time.perf_counter()

    def _scorable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that every reward model's template accepts; each may refuse max_bad_fraction of them.
        One that is refused later would end the run in its batch."""
        for scorer in filter(None, (self.reward_model, self.independent)):
            source = f"the prompts, read by {scorer.encoder.tokenizer.name_or_path}"
            groups = [Group(p.id, p.messages, ("x",), (), source=source) for p in prompts]
            report = scorer.encoder.encode(groups)[1]
            report.check(groups, self.recipe.data.max_bad_fraction)
            prompts = [prompt for i, prompt in enumerate(prompts) if i not in report.refused]
        return [*prompts]

    def reward(self, prompts: Sequence[Any], texts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """The reward of every response of a batch; adds the number of cut texts to the result."""
        rewards, num_cut = score_texts(self.reward_model, prompts, texts)
        self.result.num_cut += num_cut
        return rewards

    def prompts_of_step(self, step: int) -> list[Prompt]:
        """The prompts of batch `step`, counted from 0."""
        training = self.recipe.training
        per_step = training.batch_size // training.responses_per_prompt
        indices = prompts_of_step(len(self.train_prompts), step, per_step, training.seed)
        return [self.train_prompts[i] for i in indices]

    def log_batch(self, step: int, values: Mapping[str, float]) -> None:
        """Log means over every `log_every` batches; a KL that stays too high stops the run."""
        now = time.perf_counter()
        self.batches.append(values)
        self._seconds.append(now - self._since)
        self._since = now
        if step % self.recipe.tracking.log_every == 0 or step == self.recipe.training.steps:
            means = {n: float(np.mean([batch[n] for batch in self.batches])) for n in values}
            self.log.report("rlhf", step, means | {"seconds": float(np.mean(self._seconds))})
            self.batches, self._seconds = [], []
        rules, kl, result = self.recipe.watch, values["kl"], self.result
        result.num_high_kl = result.num_high_kl + 1 if kl > rules.max_kl else 0
        if result.num_high_kl >= rules.patience:
            result.stopped = (
                f"the KL from the start policy is {kl:.1f} nat per response, above watch.max_kl "
                f"{rules.max_kl:g}, for {result.num_high_kl} batches: raise algorithm.kl_coefficient, or "
                "lower training.learning_rate"
            )

    def evaluate(self, step: int) -> bool:
        """Measure the policy on held-out prompts; returns whether this step is the best so far."""
        recipe, result = self.recipe, self.result
        # always the same prompts and seed: two evaluations differ only by the policy
        prompts = self.held_out_prompts[: recipe.evaluation.prompts]
        rollouts = self.actor.write(prompts, 1, _HELD_OUT_SEED + recipe.training.seed)
        rewards = by_name(score_rollouts(self.reward_model, rollouts))
        if self.independent is not None:
            rewards["independent"] = score_rollouts(self.independent, rollouts)
        if self.gold is not None:
            gold = [self.gold(r.prompt.messages, *r.texts) for r in rollouts]
            rewards["gold"] = np.array(gold, np.float32)
        kls = self.actor.kls(rollouts)
        self.last_kl = float(kls.mean())
        if self.last_kl < -2.0 * float(kls.std()) / len(kls) ** 0.5:
            log.warning(
                f"step {step}: the held-out KL is estimated as {self.last_kl:.3f} nat, below 0 by more "
                "than its noise; it counts as 0. Measure it on more prompts (evaluation.prompts)"
            )
        selected_by, scores = select_measure(rewards, kls, recipe.evaluation.kl_penalty)
        is_best = float(scores.mean()) > result.best_score
        if is_best:
            means = {name: float(values.mean(dtype=np.float64)) for name, values in rewards.items()}
            result.best_step, result.best_score = step, float(scores.mean())
            result.best, result.selected_by = means | {"kl": self.last_kl}, selected_by
        self._log_held_out(step, rollouts, rewards, kls)
        if selected_by in _UNTRAINED:
            result.history.append((float(rewards["reward"].mean()), scores.tolist()))
            del result.history[:-WINDOW]
            result.stopped = result.stopped or reward_hacking(result.history)
        return is_best

    def _log_held_out(
        self, step: int, rollouts: list[Rollout], rewards: Mapping[str, Responses], kls: Responses
    ) -> None:
        """Write an evaluation, and some of its responses to read."""
        values: dict[str, float] = {}
        for name, own in rewards.items():
            e = clustered_bootstrap(own.astype(np.float64), proportion=False)
            values |= {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
        values["kl"] = self.last_kl
        values["length"] = float(np.mean([len(ids) for r in rollouts for ids in r.response_ids]))
        values["ended"] = float(np.mean([end for r in rollouts for end in r.ended]))
        self.log.report("held-out", step, values)
        for i, rollout in enumerate(rollouts[:NUM_SAMPLES]):
            prompt = conversation_text(rollout.prompt.messages)
            measures = {name: float(own[i]) for name, own in (*rewards.items(), ("kl", kls))}
            sample = {"step": step, "prompt": prompt, "response": rollout.texts[0]}
            self.folder.append_sample(sample | measures)
        self._since = time.perf_counter()

    def is_due(self, step: int, every: int) -> bool:
        """Whether `step` is a multiple of `every`, the last step, or the step at which the run stops."""
        last = step == self.recipe.training.steps or self.result.stopped is not None
        return last or (every > 0 and step % every == 0)

    def record_provenance(self) -> None:
        """`RunFolder.record_provenance` with the run's inputs and its numbers of prompts."""
        num_train, num_held_out = len(self.train_prompts), len(self.held_out_prompts)
        counts = {"train_prompts": num_train, "held_out_prompts": num_held_out}
        self.folder.record_provenance(
            seed=self.recipe.training.seed,
            **input_digests(self.recipe, with_gold=self.gold is not None),
            details={"algorithm": self.recipe.algorithm.name, **counts},
        )

    def finish(self, num_steps: int) -> RlhfResult:
        """Export the current policy, which must be the best step's, unless that is already done."""
        self.result.num_steps = num_steps
        write_result(self.folder.path / "result.json", self.result)
        if self.folder.model_path.is_dir():
            return self.result
        dtype = torch.bfloat16 if self.recipe.training.precision == "bf16" else torch.float32
        actor, unverified = self.actor, self.folder.unverified_path
        # log-probs of the policy itself, not at the sampling temperature
        actor.model.transform = replace(actor.model.transform, temperature=1.0)
        prompts = self.held_out_prompts[:NUM_SAMPLES]
        golden = [Group("held-out", prompt.messages, PLAIN.responses) for prompt in prompts]
        options: Any = {"max_tokens": actor.max_tokens, "autocast": actor.autocast}
        memory = score_in_memory(actor.model, actor.encoder, golden, **options)
        with atomic_directory(unverified, replace=True) as aside:
            export_policy(actor.model, actor.encoder, aside / "policy", dtype=dtype)
        prove(
            unverified,
            self.folder.model_path,
            lambda models: check_policy(models / "policy", memory),
            f"no training is lost: PPO repeats the export with hafrm rlhf --resume {self.folder.path}",
        )
        return self.result


def input_digests(recipe: RlhfRecipe, *, with_gold: bool) -> dict[str, dict[str, str]]:
    """`data` and `inputs` of `record_provenance`."""
    data, judge = recipe.data, recipe.evaluation.reward_model
    template = str(load_tokenizer(recipe.model).chat_template)
    inputs = {
        **model_digests("model.path", recipe.model.path, recipe.model.revision),
        **model_digests("model.policy_from", recipe.model.policy_from),
        **model_digests("reward.model", recipe.reward.model),
        **model_digests("evaluation.reward_model", judge),
        "the chat template": hashlib.sha256(template.encode()).hexdigest(),
        "--gold": str(with_gold),
    }
    if recipe.reward.implicit_weight:  # its reference may lie elsewhere
        for part in model_files(heads_for(str(recipe.reward.model), BOTH)):
            inputs |= model_digests("reward.model", str(part))
    return {"data": file_digests([*data.train, *data.validation]), "inputs": inputs}


def load_prompts(
    data: PromptSection, encoder: Encoder, seed: int, folder: RunFolder
) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts); prompts that are too long are left out.

    Raises DataError if no prompt of a part is left.
    """

    def read(sources: Sequence[str], bad_rows: str) -> Sequence[Group]:
        file = folder.path / bad_rows
        return read_prompts(sources, max_bad_fraction=data.max_bad_fraction, bad_rows_file=file)

    train = read(data.train, "bad_rows.jsonl")
    if data.validation:
        held_out = read(data.validation, "bad_validation_rows.jsonl")
    else:
        fraction, seed = data.validation_fraction, _SPLIT_SEED + seed
        train, held_out = split_by_prompt(train, fraction=fraction, seed=seed)
    parts = {"data.train": without_prompts(train, held_out), "data.validation": held_out}
    fitting = [encode_prompts(groups, encoder, data) for groups in parts.values()]
    for (name, groups), prompts in zip(parts.items(), fitting, strict=True):
        if not prompts:
            raise DataError(
                f"{name} has no prompt of at most {data.max_prompt_length} tokens "
                f"({len(groups)} longer ones): raise data.max_prompt_length, or give other sources"
            )
    return fitting[0], fitting[1]


def prompts_of_step(num_prompts: int, step: int, per_step: int, seed: int) -> NDArray[np.int64]:
    """Indices of a step's prompts: every prompt once per pass, each pass in its own order."""
    # a pure function, so that a resumed run uses the same prompts as an uninterrupted one
    epochs, within = np.divmod(np.arange(step * per_step, (step + 1) * per_step), num_prompts)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(num_prompts)
        for epoch in np.unique(epochs).tolist()
    }
    return np.array([orders[e][i] for e, i in zip(epochs.tolist(), within, strict=True)], np.int64)
