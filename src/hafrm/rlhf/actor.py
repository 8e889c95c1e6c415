"""A policy in RLHF: one set of weights for sampling and log-probs, its frozen start, and its prompts.

The stock causal LM samples; the HybridModel around the same weights gives log-probs of packed sequences.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from hafrm.data.encoding import Encoder
from hafrm.engine.layout import Layout, lay_out
from hafrm.engine.model import HybridModel, sharing_obstacle, split_causal_lm
from hafrm.engine.sampling import Sampling, sample, sampled_ratios
from hafrm.errors import ConfigError
from hafrm.preferences import Group, Message
from hafrm.rlhf.rlhf_recipe import PromptSection, RlhfRecipe, SamplingSection
from hafrm.scoring.forward import first_responses, plan_sequences, run_forward, share_prompts
from hafrm.scoring.loading import load_base
from hafrm.scoring.model_files import default_device
from hafrm.training.setup import inject_lora

log = logging.getLogger("hafrm")


@dataclass(frozen=True, eq=False)
class Prompt:
    """Messages up to the response, and their ids under the policy's template."""

    id: str
    messages: tuple[Message, ...]
    ids: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt and the responses that a policy wrote to it; can be laid out as it is."""

    prompt: Prompt
    response_ids: tuple[NDArray[np.int32], ...]  # with their end if the policy ended by itself
    texts: tuple[str, ...]
    ended: tuple[bool, ...]

    @property
    def prompt_ids(self) -> NDArray[np.int32]:
        return self.prompt.ids


def encode_prompts(groups: Sequence[Group], encoder: Encoder, data: PromptSection) -> list[Prompt]:
    """The prompts of at most `data.max_prompt_length` tokens; none is cut, since half a question is another
    question. DataError if the template refuses more than `data.max_bad_fraction` of them."""
    encoded, report = encoder.encode_prompts(groups)
    report.check(groups, data.max_bad_fraction)
    groups = [group for i, group in enumerate(groups) if i not in report.refused]
    fitting = [
        Prompt(group.id, group.prompt, ids)
        for group, ids in zip(groups, encoded, strict=True)
        if len(ids) <= data.max_prompt_length
    ]
    num_long = len(groups) - len(fitting)
    if num_long:
        log.info("%d of %d prompts are too long and left out", num_long, len(groups))
    return fitting


def write_responses(
    causal: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    num: int,
    section: SamplingSection,
    *,
    seed: int,
) -> list[Rollout]:
    """`num` responses to each prompt; the same weights, prompts and seed give the same responses."""
    ends = encoder.turn_ends(causal.generation_config)
    drawn = sample(
        causal,
        [prompt.ids.tolist() for prompt in prompts],
        num,
        Sampling(**section.model_dump(exclude={"batch_size"})),
        ends=ends,
        pad=encoder.pad_id,
        seed=seed,
        batch_size=section.batch_size,
    )
    rollouts = []
    for prompt, responses in zip(prompts, drawn, strict=True):
        texts, ended = zip(*(encoder.read_response(ids, ends) for ids in responses), strict=True)
        arrays = tuple(np.array(ids, np.int32) for ids in responses)
        rollouts.append(Rollout(prompt, arrays, texts, ended))
    return rollouts


Packed = tuple[Layout, Int[Tensor, " _"]]
"""A packed sequence, and the indices of its tokens in the batch."""


def pack(
    rollouts: Sequence[Rollout], chosen: NDArray[np.int64], max_tokens: int, device: torch.device
) -> list[Packed]:
    """Packed sequences of the responses to the chosen prompts, each of up to `max_tokens` tokens."""
    starts = np.cumsum([0, *(len(ids) for r in rollouts for ids in r.response_ids)])
    first = first_responses(rollouts)
    # indices of `shared` count only the responses to the chosen prompts
    of_batch = np.concatenate([first[i] + np.arange(len(rollouts[i].texts)) for i in chosen])
    shared = share_prompts([rollouts[i] for i in chosen], max_tokens)
    sequences = []
    for plan in plan_sequences([item.group for item in shared], max_tokens):
        responses = of_batch[np.concatenate([shared[i].indices for i in plan])]
        tokens = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in responses])
        layout = lay_out([shared[i].group for i in plan]).to(device)
        sequences.append((layout, torch.from_numpy(tokens).to(device)))
    return sequences


@dataclass(eq=False)
class Actor:
    """A policy and its reference, ready for sampling and for log-probs."""

    causal: PreTrainedModel
    model: HybridModel  # around the same weights as `causal`
    encoder: Encoder
    sampling: SamplingSection
    max_tokens: int  # of a packed sequence
    adapters: bool = False  # the reference is `model` without its adapters, else a copy
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        # the log-probs of what is sampled are those at the sampling temperature
        temperature = self.sampling.temperature
        self.model.transform = replace(self.model.transform, temperature=temperature)
        copied = None if self.adapters else copy.deepcopy(self.model)
        self._start = None if copied is None else copied.requires_grad_(False).eval()

    @classmethod
    def load(cls, recipe: RlhfRecipe, encoder: Encoder, *, share: bool = True) -> "Actor":
        """The policy that the recipe starts from; `share` False leaves its attention unchanged."""
        bf16, lora = recipe.training.precision == "bf16", recipe.lora
        # only frozen weights may be bf16: a small update of a bf16 weight rounds to nothing
        dtype = torch.bfloat16 if bf16 and lora else torch.float32
        causal = load_base(recipe.model, dtype, default_device())
        longest = recipe.data.max_prompt_length + recipe.sampling.max_new_tokens
        positions = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ConfigError(
                f"data.max_prompt_length and sampling.max_new_tokens make {longest} tokens, but the model "
                f"takes {positions}"
            )
        backbone, head = split_causal_lm(causal)
        sharing = share and sharing_obstacle(backbone) is None  # tried before there are adapters
        if lora is not None:
            causal.requires_grad_(False)
            inject_lora(lora, backbone, under_autocast=bf16)
        model = HybridModel(backbone, policy_head=head, sharing=sharing)
        budget, adapters = recipe.training.max_tokens, lora is not None
        autocast = torch.bfloat16 if bf16 else None
        actor = cls(causal, model, encoder, recipe.sampling, budget, adapters, autocast)
        if recipe.training.gradient_checkpointing:  # not for the reference, which has no backward
            model.checkpoint_activations()
        return actor

    @contextlib.contextmanager
    def reference(self) -> Iterator[HybridModel]:
        """The frozen start policy in a `with` block, in which nothing else may run the policy."""
        tuned = [m for m in self.model.modules() if self.adapters and isinstance(m, BaseTunerLayer)]
        try:
            for module in tuned:
                module.enable_adapters(False)
            yield self.model if self._start is None else self._start
        finally:
            for module in tuned:
                module.enable_adapters(True)

    @property
    def turn_ends(self) -> tuple[int, ...]:
        """The ids that end a response."""
        return self.encoder.turn_ends(self.causal.generation_config)

    def write(self, prompts: Sequence[Prompt], num: int, seed: int) -> list[Rollout]:
        """`num` responses to each prompt, in the precision of training."""
        with self.precision():
            return write_responses(
                self.causal, self.encoder, prompts, num, self.sampling, seed=seed
            )

    def kls(self, rollouts: Sequence[Rollout]) -> NDArray[np.float32]:
        """log pi - log pi_ref of every response, nat: their mean estimates KL(pi || pi_ref), where pi is
        the distribution that responses are drawn from."""
        if not self.samples_policy:
            starts = np.cumsum([0, *(len(ids) for r in rollouts for ids in r.response_ids)])[:-1]
            ratios: NDArray[np.float32] = self.sampled_ratios(rollouts).cpu().numpy()
            return np.add.reduceat(ratios, starts)

        def run(model: HybridModel) -> NDArray[np.float32]:
            options: Any = {"max_tokens": self.max_tokens, "autocast": self.autocast}
            return np.asarray(run_forward(model, rollouts, **options).logps)

        policy = run(self.model)
        with self.reference() as start:
            reference = run(start)
        return policy - reference

    @property
    def samples_policy(self) -> bool:
        """Whether responses are drawn from the policy itself, at the same temperature as its log-probs."""
        return self.sampling.top_p == 1.0 and self.sampling.repetition_penalty == 1.0

    @torch.no_grad()
    def sampled_ratios(self, rollouts: Sequence[Rollout]) -> Float[Tensor, " tokens"]:
        """`sampled_ratios` of every response token, nat, in the order of the responses."""
        device = self.model.device
        responses = [(r.prompt_ids, ids) for r in rollouts for ids in r.response_ids]
        num = sum(len(ids) for _, ids in responses)
        sequences = pack(rollouts, np.arange(len(rollouts)), self.max_tokens, device)

        def states(model: HybridModel) -> Float[Tensor, "tokens hidden"]:
            parts = [(tokens, model.tokens(layout).hidden) for layout, tokens in sequences]
            hidden = parts[0][1].new_empty(num, parts[0][1].shape[1])
            for tokens, part in parts:
                hidden[tokens] = part
            return hidden

        with self.precision():
            own = states(self.model)
            with self.reference() as start:
                lengths = [len(ids) for _, ids in responses]
                splits = [hidden.split(lengths) for hidden in (own, states(start))]
                options = Sampling(**self.sampling.model_dump(exclude={"batch_size"}))
                parts = [
                    sampled_ratios((self.model, a), (start, b), prompt, ids, options)
                    for (prompt, ids), a, b in zip(responses, *splits, strict=True)
                ]
        return torch.cat(parts)

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """The autocast that the run trains with, or nothing."""
        enabled = self.autocast is not None
        return torch.autocast(self.model.device.type, self.autocast, enabled=enabled)
