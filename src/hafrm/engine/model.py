"""One backbone, two heads: rewards and log-probs of every response from one forward.

HybridModel wraps a stock transformers causal LM (or classifier) without touching its code. Rewards are
read at the last real token, by position and never by comparing ids with pad, in float32. Dropout is off.
"""

import contextlib
import copy
import inspect
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation

from hafrm.engine.attention import (
    READ_INDICES,
    SHARED_PREFIX,
    CannotShareError,
    checkpoint_around_compiled,
    narrow_layer,
    widen_layer,
)
from hafrm.engine.layout import Layout, Team, lay_out, unshare
from hafrm.engine.logprobs import LogitTransform, token_logprobs
from hafrm.errors import ModelError, NumericsError
from hafrm.preferences import TokenizedGroup

log = logging.getLogger("hafrm")

# Where a backbone stores its original attention; it may be wrapped more than once.
_STOCK_ATTENTION = "_hafrm_stock_attention"
_OBSTACLE = "_hafrm_sharing_obstacle"
_RATES = "_hafrm_rates"  # where a config stores its original rates
_SHAREABLE_LAYERS = {"full_attention", "sliding_attention"}


class Outputs(NamedTuple):
    """What one forward returns, per response; None for a head that the model lacks."""

    rewards: Float[Tensor, " responses"] | None  # w . h_last, float32
    logps: Float[Tensor, " responses"] | None  # sum of the response tokens' log-probs, float32, nat
    lengths: Int[Tensor, " responses"]  # response tokens, the EOS included
    reward_states: Float[Tensor, "responses hidden"] | None  # what rewards are read from, detached
    token_logps: Float[Tensor, " scored"] | None  # what `logps` sums, detached


class TokenOutputs(NamedTuple):
    """The state that predicts each response token, and the token's log-prob, float32, nat."""

    hidden: Float[Tensor, "scored hidden"]
    logps: Float[Tensor, " scored"]


class HiddenStates(NamedTuple):
    """The last layer's output, and the indices where heads read it; other rows may hold anything."""

    hidden: Float[Tensor, "tokens hidden"]
    predictor: Int[Tensor, " scored"]
    last: Int[Tensor, " responses"]


class HybridModel(nn.Module):
    """A backbone with a reward head, a policy head, or both.

    Without `sharing`, for models whose layers cannot share a prefix, every response runs as its own padded
    sequence through the model's stock attention: the reference implementation.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        reward_head: nn.Linear | None = None,
        policy_head: nn.Linear | None = None,
        sharing: bool = True,
    ) -> None:
        super().__init__()
        if reward_head is None and policy_head is None:
            raise ModelError("a HybridModel needs a reward head, a policy head, or both")
        self.backbone = backbone
        self.compute_device: torch.device | None = None
        self.team = Team()
        self.reward_head = None if reward_head is None else reward_head.float()
        self.policy_head = policy_head
        self.reads_scored = policy_head is not None  # all response tokens, or only the last ones
        self.transform = logit_transform(backbone.config)
        if not hasattr(backbone, _STOCK_ATTENTION):
            setattr(backbone, _STOCK_ATTENTION, str(backbone.config._attn_implementation))
        self.sharing = self.checkpointing = False
        switch_off_dropout(self)
        fuse_gelu(backbone)
        self.share(sharing)
        if layers := decoder_layers(backbone):
            narrow_layer(layers[-1])

    def share(self, sharing: bool) -> None:
        """Lay prompts out once (True) or once per response (False)."""
        if sharing and (obstacle := sharing_obstacle(self.backbone)):
            raise CannotShareError(obstacle)
        stock = str(getattr(self.backbone, _STOCK_ATTENTION))
        self.backbone.set_attn_implementation(SHARED_PREFIX if sharing else stock)
        self.sharing = sharing

    def checkpoint_activations(self, *, offload: bool = False, **options: Any) -> None:
        """Keep only layer inputs (with `offload`, on the host) and recompute the rest in backward.
        `options` are torch's."""
        enable = getattr(self.backbone, "activation_checkpointing_enable", None)
        enable = enable or self.backbone.gradient_checkpointing_enable
        enable({"use_reentrant": False, **options}, **({"offload": True} if offload else {}))
        self.backbone.train()
        self.checkpointing = True

    def compile_layers(self) -> None:
        """Compile every decoder layer once for all packed lengths, which are symbolic."""
        layers = decoder_layers(self.backbone)
        widen_layer(layers[-1])  # a graph cannot contain hooks that depend on the sequence
        for layer in layers:
            checkpoint_around_compiled(layer)
            layer.compile(dynamic=True)

    def forward(self, layout: Layout) -> Outputs:
        """Rewards and log-probs of the layout's responses, in the layout's order."""
        states = self.hidden_states(layout)
        rewards = logps = reward_states = token_logps = None
        if self.reward_head is not None:
            last = states.hidden[states.last]
            with torch.autocast(last.device.type, enabled=False):
                column: Tensor = self.reward_head(last.float())
            # a sum over the single column: FSDP2 warns if a model returns a view
            rewards, reward_states = column.sum(1), last.detach()
        if self.policy_head is not None:
            team = self.team if self.sharing else Team()
            scored = states.predictor, layout.targets, layout.response_of
            predictor, targets, owners = map(team.own, scored)
            tokens = self._token_logps(states.hidden[predictor], targets)
            sums = torch.zeros(layout.num_responses, dtype=torch.float32, device=tokens.device)
            sums = sums.index_add(0, owners, tokens)
            token_logps = tokens.detach()
            logps = sums if team.size == 1 else team.add_up(sums)
        return Outputs(rewards, logps, layout.lengths, reward_states, token_logps)

    def tokens(self, layout: Layout) -> TokenOutputs:
        states = self.hidden_states(layout)
        hidden = states.hidden[states.predictor]
        return TokenOutputs(hidden, self._token_logps(hidden, layout.targets))

    def last_states(self, layout: Layout) -> Float[Tensor, "responses hidden"]:
        """The hidden state of each response's last real token, float32: what a reward is read from."""
        states = self.hidden_states(layout, layout.last)
        return states.hidden[states.last].float()

    def hidden_states(
        self, layout: Layout, read: Int[Tensor, " read"] | None = None
    ) -> HiddenStates:
        """Hidden states, correct at least at the indices `read`; by default those that the heads read."""
        if not self.sharing:
            padded = unshare(layout)
            hidden = self.backbone(
                input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False
            ).last_hidden_state.flatten(0, 1)
            return HiddenStates(hidden, padded.predictor, padded.last)
        if read is None:
            read = layout.read if self.reads_scored else layout.last
        team = self.team
        # A team runs the whole last layer: finding which tokens of a part are read would make a GPU wait.
        narrow = {READ_INDICES: read} if team.size == 1 else {"team": team}
        hidden = self.backbone(**_shared_inputs(layout, team), **narrow).last_hidden_state[0]
        hidden = hidden if team.size == 1 else team.gather(hidden, layout)
        return HiddenStates(hidden, layout.predictor, layout.last)

    def _token_logps(
        self, hidden: Float[Tensor, "scored hidden"], targets: Int[Tensor, " scored"]
    ) -> Float[Tensor, " scored"]:
        head = self.policy_head
        assert head is not None
        return token_logprobs(
            hidden, head.weight, targets, bias=head.bias, transform=self.transform
        )

    @property
    def device(self) -> torch.device:
        """The device that it computes on; its parameters may lie on the host."""
        return self.compute_device or next(self.parameters()).device


def switch_off_dropout(module: nn.Module) -> None:
    """Set every dropout probability and router jitter to zero: two forwards of one batch must agree."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        # Some layers keep the rate as a number, some read it from their config (Falcon).
        for owner in (part, getattr(part, "config", None)):
            for name, value in list(vars(owner).items()) if owner is not None else ():
                if ("drop" in name or "jitter" in name) and isinstance(value, float) and value:
                    setattr(owner, name, 0.0)
                    if isinstance(owner, PretrainedConfig):
                        vars(owner).setdefault(_RATES, {})[name] = value


def with_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config, for export, with the original rates that `switch_off_dropout` set to zero."""
    config = copy.deepcopy(config)
    for part in (config, *[v for v in vars(config).values() if isinstance(v, PretrainedConfig)]):
        for name, rate in vars(part).pop(_RATES, {}).items():
            setattr(part, name, rate)
    return config


def fuse_gelu(module: nn.Module) -> None:
    """Replace GPT-2's and Phi's GELU of nine operations by torch's single one; the config is unchanged."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))


@contextlib.contextmanager
def stock_attention(backbone: PreTrainedModel) -> Iterator[None]:
    """Use the backbone's original attention in a `with` block, for code without a layout (generation)."""
    shared = backbone.config._attn_implementation == SHARED_PREFIX
    if shared:
        backbone.set_attn_implementation(str(getattr(backbone, _STOCK_ATTENTION)))
    try:
        yield
    finally:
        if shared:
            backbone.set_attn_implementation(SHARED_PREFIX)


def new_reward_head(hidden_size: int, generator: torch.Generator | None = None) -> nn.Linear:
    """A float32 linear head without bias, drawn from N(0, 1 / (hidden + 1)) as in TRL and open-instruct."""
    head = nn.Linear(hidden_size, 1, bias=False)
    nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5, generator=generator)
    return head


def decoder_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers, by the class names that transformers does not split."""
    names = set(getattr(backbone, "_no_split_modules", None) or ())
    return [module for module in backbone.modules() if type(module).__name__ in names]


def hidden_size(config: PretrainedConfig) -> int:
    """Width of the last hidden state."""
    return int(config.get_text_config().hidden_size)


def num_kv_heads(config: PretrainedConfig) -> int:
    """Number of attention heads of keys and values."""
    text = config.get_text_config()
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def longest_sequence(config: PretrainedConfig) -> int | None:
    """Tokens that a prompt with its response may have; None: no limit."""
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [part for part in rope.values() if isinstance(part, dict)]
    for part in by_layer_type or [rope]:
        # Beyond this length longrope's factors (Phi-3 with 128k) change, and with them those of every
        # shorter conversation in the same sequence or batch.
        if part.get("rope_type") == "longrope":
            limits.append(part["original_max_position_embeddings"])
    return min((int(limit) for limit in limits if limit is not None), default=None)


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """What the model's own LM head does after its product: a cap (Gemma-2), a factor or divisor."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    names = ("final_logit_softcapping", "logits_soft_cap")
    softcap = next((cap for name in names if (cap := getattr(text, name, None))), None)
    return LogitTransform(scale=scale, softcap=softcap)


def sharing_obstacle(backbone: PreTrainedModel) -> str | None:
    """Why this model's layers cannot share prompts, or None; `self_check` guards the rest."""
    if not hasattr(backbone, _OBSTACLE):  # found once, before the model is sharded
        setattr(backbone, _OBSTACLE, _obstacle_by_config(backbone) or _obstacle_by_trial(backbone))
    obstacle: str | None = getattr(backbone, _OBSTACLE)
    return obstacle


def _obstacle_by_config(backbone: PreTrainedModel) -> str | None:
    config = backbone.config.get_text_config()
    if strange := set(getattr(config, "layer_types", None) or ()) - _SHAREABLE_LAYERS:
        kinds = ", ".join(sorted(strange))
        return f"it has layers that carry state or chunk the sequence ({kinds})"
    if getattr(config, "alibi", False):
        return "its ALiBi biases follow row indices, not positions"
    if not getattr(backbone, "_supports_attention_backend", False):
        return "its attention does not go through transformers' AttentionInterface"
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return "it takes no position_ids, so a second branch cannot restart at the prompt's end"
    return None


@torch.no_grad()
def _obstacle_by_trial(backbone: PreTrainedModel) -> str | None:
    """Run three tokens: layers may keep the layout from the attention, mask by themselves or have sinks."""
    ids = np.ones(1, np.int32)
    layout = lay_out([TokenizedGroup(ids, (ids, ids))]).to(next(backbone.parameters()).device)
    stock, training = str(backbone.config._attn_implementation), backbone.training
    backbone.eval()
    backbone.set_attn_implementation(SHARED_PREFIX)
    try:
        backbone(**_shared_inputs(layout))
    except CannotShareError as error:
        return error.reason
    except Exception as error:  # noqa: BLE001 - such as experts that cannot run without weights
        log.info("shared prompts were not tried: %s", error)
    finally:
        backbone.set_attn_implementation(stock)
        backbone.train(training)
    return None


def _shared_inputs(layout: Layout, team: Team | None = None) -> dict[str, Any]:
    own = (team or Team()).own
    return {
        "input_ids": own(layout.input_ids)[None],
        "position_ids": own(layout.position_ids)[None],
        "attention_mask": None,
        "use_cache": False,
        "branch_layout": layout,
    }


def split_causal_lm(model: Any) -> tuple[PreTrainedModel, nn.Linear]:
    """Backbone and policy head of a stock causal LM; raises ModelError if it has none."""
    backbone, head = model.base_model, model.get_output_embeddings()
    if head is None or backbone is model:
        raise ModelError(
            f"{type(model).__name__} is not a causal LM with a backbone and an LM head; "
            "give model.path a checkpoint that AutoModelForCausalLM loads"
        )
    _check_head(model, backbone, head)
    return backbone, head


@torch.no_grad()
def _check_head(model: Any, backbone: PreTrainedModel, head: nn.Linear) -> None:
    """Compare log-probs with the model's own on three tokens: heads may do more than configs say."""
    if backbone.config._attn_implementation == SHARED_PREFIX:
        return  # wrapped before, hence compared before
    ids = torch.arange(3, device=head.weight.device)[None] + 1
    training = model.training
    model.eval()
    expected = model(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    model.train(training)
    ours = logit_transform(backbone.config).apply_(head(hidden).float()).log_softmax(-1)
    # Half-precision logits are off by 1/256 of their size on either side: some hundredths of a nat.
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 0.25
    if not float((ours - expected).abs().max()) <= tolerance:
        raise ModelError(
            f"{type(model).__name__} computes its logits in an unknown way: log-probs would "
            "be wrong; take a checkpoint of another kind"
        )


@torch.no_grad()
def self_check(model: HybridModel, layout: Layout) -> float:
    """Largest relative difference between shared prompts and one response at a time (0 without sharing);
    NumericsError if it is above the tolerance."""
    if not model.sharing:
        return 0.0
    half = torch.is_autocast_enabled(model.device.type)
    half = half or next(model.backbone.parameters()).dtype in (torch.float16, torch.bfloat16)
    tolerance = 0.1 if half else 1e-3  # a wrong mask is off by 0.1 and more in float32, 1 in half
    shared = model(layout)
    model.share(False)
    try:
        plain = model(layout)
    finally:
        model.share(True)
    hidden = logp = 0.0
    # Compares states, not rewards: the rounding error of a reward near 0 is as large as that of any other.
    if shared.reward_states is not None:
        states, plain_states = shared.reward_states.float(), plain.reward_states.float()
        hidden = float(((states - plain_states).norm(dim=1) / plain_states.norm(dim=1)).max())
    if shared.logps is not None:
        scale = plain.logps.abs().clamp(min=1.0)
        logp = float(((shared.logps - plain.logps).abs() / scale).max())
    if not (hidden <= tolerance and logp <= tolerance):  # also for NaN
        raise NumericsError(
            "this model gives other numbers with shared prompts than without: hidden states differ by "
            f"{hidden:.2g}, log-probs by {logp:.2g} (relative; tolerated {tolerance:g}). Its layers cannot "
            "share a prefix; set training.sharing: off"
        )
    return max(hidden, logp)
