"""PPO's update against the reference implementation, on a known problem, and what must not change it."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel, split_causal_lm
from hafrm.errors import NumericsError
from hafrm.preferences import Group, Message
from hafrm.recipe import LoraSection
from hafrm.rlhf.actor import Actor, Prompt, Rollout, encode_prompts, write_responses
from hafrm.rlhf.ppo_update import PolicyWithValue, advantages_of, measure_rollouts, pack, update
from hafrm.rlhf.rlhf_recipe import AlgorithmSection, PromptSection, SamplingSection
from hafrm.training.setup import inject_lora
from hafrm.training.step import build_optimizer
from support.chat_tokenizers import GEMMA_LIKE, chat_tokenizer
from support.models import tiny_causal_lm, token_groups
from support.reference_ppo import ReferencePpo, ReferenceRules
from support.tiny_runs import write_base

SHAPES = [(5, (4, 7)), (3, (1, 2)), (9, (6, 3)), (4, (5, 5))]
SCORES = [1.0, -0.5, 2.0, 0.3, -1.2, 0.7, 0.0, 1.5]
ALGORITHM = AlgorithmSection(
    epochs=2, mini_batches=2, clip=0.1, kl_coefficient=0.3, gamma=0.9, lam=0.8, value_weight=0.5
)
RATE, EPS = 3e-3, 1e-4
"""Adam divides by |gradient| + EPS: a smaller one would blow rounding up where gradients vanish."""


def rollouts(seed: int = 0) -> list[Rollout]:
    groups = token_groups(SHAPES, seed)
    return [
        Rollout(Prompt(f"p{i}", (), g.prompt_ids), g.response_ids, ("",) * 2, (True, True))
        for i, g in enumerate(groups)
    ]


def build(*, lora: bool = False, max_tokens: int = 40, sharing: bool = True):
    """A tiny policy with its value head, actor and optimiser, and a plain copy of its causal LM."""
    causal, twin = tiny_causal_lm("llama"), tiny_causal_lm("llama")
    for lm in (causal, twin) if lora else ():
        lm.requires_grad_(False)
        torch.manual_seed(7)
        inject_lora(LoraSection(rank=2, alpha=4.0), split_causal_lm(lm)[0])
    backbone, head = split_causal_lm(causal)
    model = HybridModel(backbone, policy_head=head, sharing=sharing)
    actor = Actor(
        causal,
        model,
        Encoder(chat_tokenizer()),
        SamplingSection(max_new_tokens=8, temperature=0.8, batch_size=8),
        max_tokens,
        adapters=lora,
    )
    policy = PolicyWithValue(model)
    optimizer = build_optimizer(policy, weight_decay=0.0, betas=(0.9, 0.999), eps=EPS)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    return policy, actor, optimizer, twin


def take(policy, actor, optimizer, batch, step=0, scores=SCORES, algorithm=ALGORITHM):
    scores = torch.tensor(scores)
    measured = measure_rollouts(policy, actor, batch)
    targets = advantages_of(measured, scores, algorithm, algorithm.kl_coefficient)
    options = {"seed": (0, step), "max_grad_norm": 1.0}
    return update(policy, optimizer, measured, targets, algorithm, actor, **options)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_batches_equal_those_of_the_reference_implementation_in_losses_and_weights(lora):
    """Two epochs of two mini-batches each; in float32 the two differ by rounding alone."""
    policy, actor, optimizer, twin = build(lora=lora)
    rules = ReferenceRules(
        **{name: getattr(ALGORITHM, name) for name in ("epochs", "mini_batches", "clip")},
        **{name: getattr(ALGORITHM, name) for name in ("value_clip", "value_weight", "gamma")},
        lam=ALGORITHM.lam,
        kl_coefficient=ALGORITHM.kl_coefficient,
        temperature=0.8,
        learning_rate=RATE,
        max_grad_norm=1.0,
        eps=EPS,
    )
    slow = ReferencePpo(twin, rules)
    for step in range(2):
        batch = rollouts(step)
        metrics = take(policy, actor, optimizer, batch, step=step)
        losses = slow.batch(
            [rollout.prompt_ids.tolist() for rollout in batch],
            [[ids.tolist() for ids in rollout.response_ids] for rollout in batch],
            SCORES,
            np.random.default_rng((0, step)),
        )
        # Mini-batches of two prompts have unequal token counts, so the means are weighed by them.
        counts = minibatch_tokens(batch, step)
        expected = np.average(np.array(losses), axis=0, weights=counts)
        assert metrics["policy_loss"] == pytest.approx(expected[0], abs=1e-6)
        assert metrics["value_loss"] == pytest.approx(expected[1], abs=1e-6)
    mine = dict(actor.causal.named_parameters())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(mine[name], parameter, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(policy.value_head.weight[0], slow.head, atol=1e-6, rtol=0.0)
    start = dict(slow.start.named_parameters())
    assert any(not torch.equal(p, start[name]) for name, p in twin.named_parameters())


def minibatch_tokens(batch: list[Rollout], step: int) -> list[int]:
    order = np.random.default_rng((0, step))
    counts = []
    for _ in range(ALGORITHM.epochs):
        for chosen in np.array_split(order.permutation(len(batch)), ALGORITHM.mini_batches):
            counts.append(sum(len(ids) for i in chosen for ids in batch[i].response_ids))
    return counts


@pytest.mark.parametrize("change", [{"max_tokens": 12}, {"max_tokens": 10_000}, {"sharing": False}])
def test_neither_packing_nor_accumulation_changes_the_weights(change):
    """12 tokens hold a prompt and one response at most, so that prompts are cut apart."""
    first, second = build(), build(**change)
    for policy, actor, optimizer, _ in (first, second):
        take(policy, actor, optimizer, rollouts())
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0.0)


def test_without_adapters_a_lora_policy_is_its_own_reference():
    policy, actor, optimizer, _ = build(lora=True)
    before = measure_rollouts(policy, actor, rollouts())
    assert float(before.kls.abs().max()) < 1e-4
    assert float(before.values.abs().max()) == 0.0
    assert float(before.entropies.min()) > 0.0
    take(policy, actor, optimizer, rollouts())
    after = measure_rollouts(policy, actor, rollouts())
    assert float(after.ratios.abs().max()) > 1e-4
    with actor.reference() as start:
        layout, _ = pack(rollouts(), np.arange(4), 10_000, policy.model.device)[0]
        reference_logps = start.tokens(layout).logps
    fresh = build(lora=True)[1].model.tokens(layout).logps
    torch.testing.assert_close(reference_logps, fresh, atol=1e-6, rtol=0.0)
    assert all(p.requires_grad for n, p in actor.model.named_parameters() if "lora_" in n)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_prompts():
    policy, actor, optimizer, _ = build()
    measured = measure_rollouts(policy, actor, rollouts())
    advantages, returns = advantages_of(measured, torch.tensor(SCORES), ALGORITHM, 0.1)
    broken = advantages * float("nan"), returns
    before = [p.detach().clone() for p in policy.parameters()]
    options = {"seed": (0, 0), "max_grad_norm": 1.0}
    with pytest.raises(NumericsError, match=r"stopped before the update\. Prompts in it: p"):
        update(policy, optimizer, measured, broken, ALGORITHM, actor, **options)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))


GOOD, BAD = 7, 11
ARMS = Prompt("arms", (), np.array([3, 4], np.int32))


def play(kl_coefficient: float, num_batches: int = 5) -> tuple[float, float]:
    """Probabilities of the good and the bad arm after training on reward 1, 0, and -1 for other tokens."""
    causal = tiny_causal_lm("llama")
    with torch.no_grad():  # start with two arms of like probability, and little else
        causal.lm_head.weight.mul_(0.1)
        bias = torch.zeros(61)
        bias[[GOOD, BAD]] = 5.0
    causal.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    backbone, head = split_causal_lm(causal)
    model = HybridModel(backbone, policy_head=head)
    actor = Actor(
        causal,
        model,
        Encoder(chat_tokenizer()),
        SamplingSection(max_new_tokens=1, batch_size=32),
        1000,
    )
    policy = PolicyWithValue(model)
    optimizer = build_optimizer(policy, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    algorithm = AlgorithmSection(kl_coefficient=kl_coefficient)
    for step in range(num_batches):
        batch = actor.write([ARMS], 32, seed=step)
        arms = [int(ids[0]) for ids in batch[0].response_ids]
        scores = [{GOOD: 1.0, BAD: 0.0}.get(arm, -1.0) for arm in arms]
        take(policy, actor, optimizer, batch, step, scores, algorithm)
    model.share(False)  # the stock attention, for a stock forward
    with torch.no_grad():
        logits = causal(input_ids=torch.tensor([[3, 4]]), use_cache=False).logits[0, -1]
    probabilities = logits.softmax(-1)
    return float(probabilities[GOOD]), float(probabilities[BAD])


def test_the_better_of_two_arms_is_learned_unless_distance_is_expensive():
    """At beta = 20 the best policy, pi_0 exp(r / beta), hardly differs from the even start."""
    good, bad = play(kl_coefficient=0.0)
    assert good > 0.9
    assert bad < 0.1
    good, bad = play(kl_coefficient=20.0, num_batches=4)
    assert abs(good - bad) < 0.35


def test_a_response_ends_where_the_templates_turn_ends_and_its_text_stops_there(tmp_path):
    """Gemma's turns end in a token that is not the tokenizer's EOS."""
    causal = AutoModelForCausalLM.from_pretrained(write_base(tmp_path))
    encoder = Encoder(chat_tokenizer(GEMMA_LIKE), max_length=100)
    (sep,) = encoder.tokenizer.encode("<|sep|>")
    text = encoder.tokenizer.encode("The sea.")

    def generate(input_ids=None, generation_config=None, **_):
        assert sep in generation_config.eos_token_id
        tail = torch.tensor([[*text, sep, encoder.pad_id], [*text, *text[:2]]])
        return torch.cat([input_ids, tail], 1)

    causal.generate = generate
    asked = Group("g", (Message("user", "Where?"),), ())
    (prompt,) = encode_prompts([asked], encoder, PromptSection(train=("x",)))
    section = SamplingSection(max_new_tokens=len(text) + 2)
    (rollout,) = write_responses(causal, encoder, [prompt], 2, section, seed=0)
    assert rollout.ended == (True, False)
    assert rollout.texts[0] == "The sea."
    assert rollout.response_ids[0].tolist() == [*text, sep]


def test_the_kl_of_a_nucleus_is_that_of_its_own_draws_in_training_and_on_held_out_prompts():
    policy, actor, *_ = build()
    batch = rollouts()
    plain = measure_rollouts(policy, actor, batch).kls
    actor.sampling = SamplingSection(max_new_tokens=8, top_p=0.5, repetition_penalty=1.2)
    assert measure_rollouts(policy, actor, batch).kls.abs().max() == 0  # not trained yet
    with torch.no_grad():
        actor.model.policy_head.weight.mul_(1.5)
    measured = measure_rollouts(policy, actor, batch)
    np.testing.assert_allclose(measured.kls.numpy(), actor.kls(batch), atol=1e-5)
    assert not torch.allclose(measured.kls, plain)
