"""The schema of an RLHF recipe: every key, with its type, bounds, default, unit and the paper's value.

The paper is HAF-RM (arXiv 2407.04185); its values are those of its released PPO script.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from hafrm.best_of_n.endpoint import EndpointSection
from hafrm.recipe import (
    CheckpointSection,
    Location,
    LoraSection,
    PolicySection,
    Section,
    Sources,
    Text,
    TrackingSection,
)


class PromptSection(Section):
    """The prompts to answer; responses and labels in the same rows are ignored."""

    train: Sources = Field(min_length=1)
    """Sources of prompts: `file`, `file#split=train&limit=1000`, `hub:name[:config]:split`, `set:name`."""
    validation: Sources = ()
    """Sources of held-out prompts; empty: hold out part of `train`."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the prompts of `train` held out if `validation` names no sources."""
    max_prompt_length: int = Field(default=384, ge=1)
    """Maximum tokens of a prompt; longer ones are left out and counted, never cut (paper: 384)."""
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)
    """Fraction of unusable rows above which the run stops."""


class RewardSection(Section):
    """What a response is worth."""

    model: Location | None = None
    """The reward model: a run folder, exported directory or hub id; null: see `comparison.models`."""
    implicit_weight: float = Field(default=0.0, ge=0)
    """grpo: weight of the implicit reward as a second reward (GDPO); 0: the main head alone."""
    scale: bool = False
    """ppo: divide by the running standard deviation of all rewards so far (paper: true)."""
    center: bool = False
    """ppo: subtract their running mean first (paper: true)."""
    clip: float | None = Field(default=None, gt=0)
    """ppo: clip the reward to -+ this after centering and scaling (paper: 3.0)."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Subtracted, after scaling, for a response that ran into the length limit (paper: 0)."""


class SamplingSection(Section):
    """How the policy samples; log-probs are at this temperature, the KL is over what can be drawn."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum tokens of a response, EOS included (paper: 128)."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits (paper: 0.5)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens of this total probability; below 1: off-policy (paper: 0.8)."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides the logits of tokens that already occur; other than 1: off-policy (paper: 1.2)."""
    batch_size: int = Field(default=64, ge=1)
    """Responses sampled at a time: affects memory and speed."""


class AlgorithmSection(Section):
    """The policy gradient, and the KL penalty that keeps the policy near its start."""

    name: Literal["ppo", "rloo", "grpo"] = "ppo"
    """ppo is hafrm's own; rloo and grpo run on TRL's trainers (paper: ppo)."""
    epochs: int = Field(default=4, ge=1)
    """Passes over each batch of responses (paper: 4)."""
    mini_batches: int = Field(default=1, ge=1)
    """ppo: updates that each pass cuts the batch into (paper: 1, two samples by accumulation)."""
    clip: float = Field(default=0.2, gt=0)
    """Probability ratios outside 1 -+ clip bring no further gain (paper: 0.2)."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Factor on the KL penalty, in reward units per nat (paper: 0.2, adaptive)."""
    kl_target: float | None = Field(default=None, gt=0)
    """ppo: KL per response that the adaptive coefficient aims at; null: it is constant (paper: 6)."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """ppo: responses over which the coefficient changes by at most a fifth (paper: 10,000)."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """ppo: discount per token (paper: 1)."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """ppo: lambda of the advantage estimates (paper: 0.95)."""
    value_weight: float = Field(default=0.1, ge=0)
    """ppo: factor on the value loss (paper: 0.1)."""
    value_rate: float = Field(default=1.0, gt=0)
    """ppo: the value head's learning rate, in multiples of training.learning_rate (paper: 1)."""
    value_clip: float = Field(default=0.2, gt=0)
    """ppo: values outside the old ones -+ value_clip bring no further gain (paper: 0.2)."""


class RlhfTrainingSection(Section):
    """The optimiser, its schedule, and how much is sampled for an update."""

    steps: int = Field(default=200, ge=1)
    """Batches of responses (paper: 15,000)."""
    batch_size: int = Field(default=64, ge=1)
    """Responses per batch (paper: 2)."""
    responses_per_prompt: int = Field(default=1, ge=1)
    """Responses to each prompt of a batch; they share the prompt in one layout (paper: 1)."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak of AdamW's learning rate (paper: 1e-6)."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """How the learning rate changes after the warm-up (paper: constant)."""
    warmup_fraction: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the steps in which it rises from 0 (paper: 0)."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """The gradient is clipped to this 2-norm; 0: not clipped (paper: 0)."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the prompts' order, of sampling and of the held-out prompts."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, else fp32; bf16: autocast over fp32 weights (frozen: bf16; paper: 4-bit)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_tokens: int = Field(default=8192, ge=1)
    """Token budget of one micro-batch. It never changes the gradient."""


class HeldOutSection(Section):
    """What is measured on held-out prompts, and which step is kept; never the training reward alone."""

    every: int = Field(default=25, ge=0)
    """Steps between evaluations; 0: only before the first step and after the last (paper: 375)."""
    prompts: int = Field(default=64, ge=2)
    """Held-out prompts, with one response each, always sampled with the same seed (paper: 64)."""
    reward_model: Location | None = None
    """A second reward model that takes no part in training and selects the best step."""
    kl_penalty: float = Field(default=0.05, ge=0)
    """Without reward_model, the best step has the highest held-out reward - kl_penalty * KL."""


class WatchdogSection(Section):
    """When a run that drifts too far from its start is stopped; the best step so far is still exported."""

    max_kl: float = Field(default=50.0, gt=0)
    """KL per response (nat, mean of a batch) that stops the run."""
    patience: int = Field(default=3, ge=1)
    """Batches in a row that must exceed max_kl."""


class ComparisonSection(Section):
    """Several reward models, compared through the policies that each of them trains."""

    models: Sources = Field(min_length=1)
    """PATH or NAME=PATH, instead of reward.model; each seed uses the next path with the same NAME."""
    test: Sources = Field(min_length=1)
    """Sources of prompts that the policies answer; not used to train or select anything."""
    seeds: int = Field(default=1, ge=1)
    """Runs of each reward model, with the seeds 0, 1, ..."""
    judge: Text | None = None
    """URL of an LLM that compares answers; null: the gold reward, or evaluation.reward_model."""


class RlhfRecipe(Section):
    """Everything that decides what an RLHF run computes, and what it reports."""

    model: PolicySection
    data: PromptSection
    reward: RewardSection = RewardSection()
    sampling: SamplingSection = SamplingSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    training: RlhfTrainingSection = RlhfTrainingSection()
    lora: LoraSection | None = None
    evaluation: HeldOutSection = HeldOutSection()
    watch: WatchdogSection = WatchdogSection()
    checkpoint: CheckpointSection = CheckpointSection(every=50)
    tracking: TrackingSection = TrackingSection(log_every=1)
    comparison: ComparisonSection | None = None
    judge: EndpointSection = EndpointSection()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "RlhfRecipe":
        if problems := "\n".join(self._problems()):
            raise ValueError(problems)
        return self

    def _problems(self) -> Iterator[str]:
        size, per_prompt = self.training.batch_size, self.training.responses_per_prompt
        name, mini_batches = self.algorithm.name, self.algorithm.mini_batches
        comparison = self.comparison
        if size % per_prompt:
            yield f"training.batch_size {size} is no multiple of training.responses_per_prompt {per_prompt}"
        if name != "ppo":
            yield from self._problems_of_trl()
        if self.reward.implicit_weight and name != "grpo":
            yield f"reward.implicit_weight needs algorithm.name grpo: {name} learns from one reward alone"
        if name == "ppo" and mini_batches > max(1, size // per_prompt):
            yield (
                f"algorithm.mini_batches is {mini_batches}, but a batch has {size // per_prompt} prompts: "
                "lower it, or raise training.batch_size"
            )
        if not self.data.validation and not self.data.validation_fraction:
            yield (
                "data.validation is empty and data.validation_fraction is 0: nothing selects the best "
                "step; give sources, or a fraction such as 0.05"
            )
        if self.judge != EndpointSection() and (comparison is None or comparison.judge is None):
            yield "settings of `judge` need comparison.judge, its URL"
        if self.reward.model is None and comparison is None:
            yield "reward.model is missing: name one (or comparison.models, to compare several)"

    def _problems_of_trl(self) -> Iterator[str]:
        name, per_prompt = self.algorithm.name, self.training.responses_per_prompt
        if per_prompt < 2:
            yield (
                f"training.responses_per_prompt is {per_prompt}, but {name} compares the responses to a "
                "prompt: set it to 2 or more (TRL's default: 8 for grpo)"
            )
        if self.model.policy_from:
            yield "model.policy_from needs algorithm.name ppo: TRL cannot load such a reference"

    @property
    def ppo_keys(self) -> list[str]:
        """Keys with another value than the default that only ppo reads."""
        return [
            f"{part}.{key}"
            for part, section in (("reward", self.reward), ("algorithm", self.algorithm))
            for key, info in type(section).model_fields.items()
            if getattr(section, key) != info.default and str(info.description).startswith("ppo:")
        ]
