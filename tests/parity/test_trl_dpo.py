"""The same ids through TRL 1.16's DPOTrainer and through us: same losses, same gradients.

TRL pads chosen and rejected rows and runs the reference live; ours come from the packed, prompt-sharing
engine. Skipped where TRL is not installed.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel, split_causal_lm
from hafrm.training.losses import PolicyLogps
from hafrm.training.methods import get_method, joint_loss
from support.models import TokenGroup, tiny_causal_lm

pytestmark = [
    pytest.mark.slow,  # importing TRL takes 6 s
    pytest.mark.filterwarnings("ignore"),
]

ROWS = [
    {"prompt": "w3 w4 w5", "chosen": " w6 w7 w8 w9", "rejected": " w10"},
    {"prompt": "w11", "chosen": " w12 w13", "rejected": " w14 w15 w16 w17 w18 w19"},
    {"prompt": "w20 w21 w22 w23 w24 w25 w26", "chosen": " w27", "rejected": " w27 w28"},
    {"prompt": "w30 w31", "chosen": " w32 w33 w34", "rejected": " w34 w33 w32"},
]
"""Short and long on either side; each word is one token and TRL appends the EOS."""

LOSSES = {"dpo": ("sigmoid", 1.0), "ipo": ("ipo", 1.0), "kto": ("apo_zero", 0.5)}
"""Our method -> TRL's loss_type and the factor between them (see kto_loss)."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 61)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer over a tiny Llama and another one as its reference."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    folder: Path = tmp_path_factory.mktemp("trl")
    return trl.DPOTrainer(
        model=tiny_causal_lm("llama", seed=1),
        ref_model=tiny_causal_lm("llama", seed=2),
        args=trl.DPOConfig(
            output_dir=str(folder),
            report_to="none",
            beta=0.1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=word_tokenizer(),
    )


@pytest.fixture
def examples(trainer: Any) -> list[dict[str, list[int]]]:
    """The ids that TRL made of ROWS."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: row[name] for name in columns} for row in trainer.train_dataset]


def packed_batch(
    policy: HybridModel, reference: HybridModel, examples: list[dict[str, list[int]]]
) -> PolicyLogps:
    """The same from the engine: every prompt once, two branches, one packed row."""
    layout = lay_out(
        [
            TokenGroup(
                np.array(row["prompt_ids"], np.int32),
                (np.array(row["chosen_ids"], np.int32), np.array(row["rejected_ids"], np.int32)),
            )
            for row in examples
        ]
    )
    got = policy(layout)
    with torch.no_grad():
        expected = reference(layout).logps
    return PolicyLogps(
        got.logps[0::2],
        got.logps[1::2],
        got.lengths[0::2],
        got.lengths[1::2],
        expected[0::2],
        expected[1::2],
    )


def trl_loss(trainer: Any, examples: list[dict[str, list[int]]], loss_type: str) -> Tensor:
    trainer.loss_types = [loss_type]
    trainer.model.zero_grad()
    return trainer.compute_loss(trainer.model, trainer.data_collator(examples))


def hybrid(model: PreTrainedModel) -> HybridModel:
    backbone, head = split_causal_lm(model)
    return HybridModel(backbone, policy_head=head)


@pytest.mark.parametrize("name", LOSSES)
def test_our_loss_and_gradients_equal_trls_from_the_packed_engine(
    name: str, trainer: Any, examples: list[dict[str, list[int]]]
) -> None:
    """Every weight's gradient within 1e-5 of the largest: both are float32 in another order of sums."""
    loss_type, factor = LOSSES[name]
    policy, reference = (copy.deepcopy(m).eval() for m in (trainer.model, trainer.ref_model))
    expected = trl_loss(trainer, examples, loss_type) * factor
    expected.backward()
    given = packed_batch(hybrid(policy), hybrid(reference), examples)
    got = joint_loss(get_method(name), logps=given).total.mean()
    got.backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    wanted = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert wanted
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for parameter_name, parameter in policy.named_parameters():
        if parameter_name in wanted:
            difference = (parameter.grad - wanted[parameter_name]).abs().max()
            assert float(difference) <= 1e-5 * scale, parameter_name
