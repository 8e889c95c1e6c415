"""Sampling: what is drawn, that nothing else decides, and that a model in training is left as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from hafrm.engine.model import HybridModel, split_causal_lm
from hafrm.engine.sampling import Sampling, sample, sampled_ratios
from hafrm.errors import ModelError
from support.models import VOCAB, tiny_causal_lm

EOS, PAD = 2, 0
PROMPTS = [[5, 9, 11, 30], [7], [8, 8, 21, 3, 4, 50, 60], [12, 13]]


def draw(model, num=2, seed=0, prompts=PROMPTS, batch_size=32, **options):
    sampling = Sampling(**{"max_new_tokens": 6, **options})
    return sample(
        model, prompts, num, sampling, ends=[EOS], pad=PAD, seed=seed, batch_size=batch_size
    )


def greedy_by_hand(model, prompt, limit=6):
    """One prompt at a time, no cache, no padding: the obvious loop."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_temperature_0_in_padded_batches_is_the_likeliest_token_of_each_prompt_alone(family):
    model = tiny_causal_lm(family)
    found = draw(model, num=2, temperature=0.0, batch_size=3)
    for prompt, responses in zip(PROMPTS, found, strict=True):
        assert responses == [greedy_by_hand(model, prompt)] * 2


def test_the_same_call_gives_the_same_responses_and_another_seed_others():
    model = tiny_causal_lm("llama")
    assert draw(model) == draw(model)
    assert draw(model, seed=1) != draw(model)
    assert [len(responses) for responses in draw(model, num=3)] == [3, 3, 3, 3]


def test_tokens_come_as_often_as_the_tempered_softmax_says():
    """2,000 draws of one token: each frequency within 5 standard errors, sqrt(p (1 - p) / 2000)."""
    model, num = tiny_causal_lm("llama"), 2000
    found = draw(model, num, prompts=[[5, 9]], max_new_tokens=1, temperature=2.0, batch_size=num)
    counts = torch.bincount(torch.tensor([r[0] for r in found[0]]), minlength=VOCAB) / num
    with torch.no_grad():
        p = (model(torch.tensor([[5, 9]])).logits[0, -1] / 2.0).softmax(-1)
    assert ((counts - p).abs() <= 5 * (p * (1 - p) / num).sqrt() + 1e-3).all()
    assert (counts > 0).sum() > 50  # a top-k of 50, transformers' default, is not applied


def test_top_p_draws_from_the_likeliest_tokens_only():
    model = tiny_causal_lm("llama")
    with torch.no_grad():
        p = model(torch.tensor([[5, 9]])).logits[0, -1].softmax(-1)
    order = p.argsort(descending=True)
    inside = order[: int((p[order].cumsum(0) < 0.5).sum()) + 1].tolist()
    responses = draw(model, 200, prompts=[[5, 9]], max_new_tokens=1, top_p=0.5)
    assert {r[0] for r in responses[0]} <= set(inside)


def test_a_model_directorys_own_generation_defaults_do_not_enter():
    """Left to themselves these would draw the likeliest token always, and never one twice."""
    model = tiny_causal_lm("llama")
    expected = draw(model, num=4)
    own = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=50.0, eos_token_id=[3, 4, 5], max_length=9
    )
    model.generation_config = own
    assert draw(model, num=4) == expected
    assert model.generation_config is own


def test_a_response_ends_in_its_first_eos_or_at_the_limit():
    model = tiny_causal_lm("llama")
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3  # some end at once, others never
    found = [r for responses in draw(model, num=40) for r in responses]
    ended = [r for r in found if r[-1] == EOS]
    assert 0 < len(ended) < len(found)
    assert all(EOS not in r[:-1] for r in found)
    assert all(len(r) == 6 for r in found if r[-1] != EOS)


def test_a_model_in_training_is_left_as_it_was():
    model = tiny_causal_lm("llama").train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draw(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_backbone_that_shares_prompts_writes_with_its_stock_attention():
    model = tiny_causal_lm("llama")
    expected = draw(model)
    backbone, head = split_causal_lm(model)
    hybrid = HybridModel(backbone, policy_head=head)
    shared = backbone.config._attn_implementation
    assert draw(model) == expected
    assert backbone.config._attn_implementation == shared
    assert hybrid.sharing


def test_progress_counts_responses_and_what_exceeds_the_model_is_refused():
    model, progress = tiny_causal_lm("llama"), []
    options = {"ends": [EOS], "pad": PAD, "seed": 0, "batch_size": 3}
    options["on_progress"] = lambda *counts: progress.append(counts)
    sample(model, PROMPTS, 2, Sampling(4), **options)
    assert progress == [(3, 8), (6, 8), (8, 8)]
    with pytest.raises(ModelError, match="lower max_new_tokens"):
        draw(model, max_new_tokens=125)
    assert draw(model, prompts=[]) == []


def test_log_ratios_of_what_can_be_drawn_average_to_a_kl_divergence():
    """Over the nucleus S: sum_S q (log q - log q_ref) >= 0, where log pi - log pi_ref averages below it."""
    models = []
    for seed in (0, 1):
        backbone, head = split_causal_lm(tiny_causal_lm("llama", seed=seed))
        transform = replace(HybridModel(backbone, policy_head=head).transform, temperature=0.7)
        model = HybridModel(backbone, policy_head=head, sharing=False)
        model.transform = transform
        models.append(model)
    options = Sampling(4, temperature=0.7, top_p=0.6, repetition_penalty=1.5)
    prompt = np.array([5, 9, 11], np.int32)
    with torch.no_grad():
        hidden = [
            m.backbone(torch.tensor([prompt.tolist()])).last_hidden_state[0, -1:] for m in models
        ]
        logits = [m.policy_head(h)[0] for m, h in zip(models, hidden, strict=True)]
    for z in logits:
        z[prompt] = torch.where(z[prompt] < 0, z[prompt] * 1.5, z[prompt] / 1.5)
        z.div_(0.7)
    p = logits[0].softmax(-1)
    order = p.argsort(descending=True)
    num = int((p[order].cumsum(0) < 0.6).sum()) + 1
    nucleus = order[:num].tolist()
    assert 1 < num < VOCAB
    log_q, log_ref = (z[nucleus].log_softmax(-1) for z in logits)
    ratios = torch.cat(
        [
            sampled_ratios(
                *zip(models, hidden, strict=True), prompt, np.array([i], np.int32), options
            )
            for i in nucleus
        ]
    )
    torch.testing.assert_close(ratios, log_q - log_ref, atol=1e-5, rtol=1e-5)
    assert (log_q.exp() * ratios).sum() > 0
    same = sampled_ratios(
        (models[0], hidden[0]), (models[0], hidden[0]), prompt, prompt[:1], options
    )
    assert same.tolist() == [0.0]
