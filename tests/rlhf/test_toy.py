"""A problem with two arms whose answer is known: PPO must find the better one, and mind its leash."""

import numpy as np
import torch

from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel, split_causal_lm
from hafrm.engine.sampling import Sampling
from hafrm.rlhf.actor import Actor, Reference
from hafrm.rlhf.ppo_update import PolicyWithValue, measure, to_ppo_batch, update
from hafrm.rlhf.prompts import Prompt
from hafrm.rlhf.rlhf_recipe import AlgorithmSection
from hafrm.training.step import build_optimizer
from models_for_tests import tiny_causal_lm
from tokenizers_for_tests import chat_tokenizer

GOOD, BAD = 7, 11
PROMPT = Prompt("arms", (), np.array([3, 4], np.int32))


def play(kl_coefficient: float, num_batches: int = 8) -> tuple[float, float]:
    """(share of the good arm, of the bad one) after training on reward 1, 0 and -1 for any other token."""
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
        Reference(model, adapters=False),
        Encoder(chat_tokenizer()),
        sampling=Sampling(max_new_tokens=1),
        batch_size=32,
        max_tokens=1000,
    )
    policy = PolicyWithValue(model)
    optimizer = build_optimizer(policy, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    algorithm = AlgorithmSection(kl_coefficient=kl_coefficient)
    for step in range(num_batches):
        rollouts = actor.write([PROMPT], 32, seed=step)
        arms = [int(ids[0]) for ids in rollouts[0].response_ids]
        scores = torch.tensor([{GOOD: 1.0, BAD: 0.0}.get(arm, -1.0) for arm in arms])
        batch = to_ppo_batch(measure(policy, actor, rollouts), scores, algorithm, kl_coefficient)
        update(policy, optimizer, batch, algorithm, actor, seed=(0, step), max_grad_norm=1.0)
    model.share(False)  # the stock attention, for a stock forward
    with torch.no_grad():
        logits = causal(input_ids=torch.tensor([[3, 4]]), use_cache=False).logits[0, -1]
    shares = logits.softmax(-1)
    return float(shares[GOOD]), float(shares[BAD])


def test_the_better_arm_is_found():
    good, bad = play(kl_coefficient=0.0)
    assert good > 0.9
    assert bad < 0.1


def test_a_dear_distance_keeps_the_policy_near_its_start():
    """At beta = 20 the best policy, pi_0 exp(r / beta), hardly differs from the even start."""
    good, bad = play(kl_coefficient=20.0, num_batches=4)
    assert abs(good - bad) < 0.35
