"""Trains the demo's own tokenizer and small language model, in about a minute on two cores.

What comes out is an ordinary transformers directory, the starting point of the reward models: a
byte-level BPE with a chat template that prints no date, and a Llama in fp32. Conversations are
packed into rows in which each attends to itself alone. Nothing is printed: progress goes to a callback.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hafrm.errors import ConfigError, NumericsError
from hafrm.preferences import Message

PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, "<|user|>", "<|assistant|>", "<|system|>", END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100
"""Label of a token that nothing predicts: padding, and the first of each conversation."""

Conversation = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of the model and how long it learns."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1024
    row_tokens: int = 256
    """Tokens of a packed row; longer conversations are an error."""
    rows_per_step: int = 4
    epochs: int = 1
    learning_rate: float = 3e-3
    warmup_fraction: float = 0.05
    weight_decay: float = 0.05
    seed: int = 0
    """Of the weights and of the order of the conversations."""


class Progress(NamedTuple):
    """One optimiser step done."""

    step: int
    num_steps: int
    loss: float
    """Mean negative log-likelihood of the step's tokens, in nats."""


class Row(NamedTuple):
    """Conversations side by side; `position_ids` start again at 0 with each of them."""

    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    labels: Int[Tensor, " tokens"]
    """The token itself, to be predicted from the one before it."""


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens with the chat template; pad differs from EOS.

    Nothing is added to a text, so the template alone decides where the special tokens stand.
    """
    if vocabulary < 256 + len(SPECIAL_TOKENS):
        msg = (
            f"Plan.vocabulary is {vocabulary}, but 256 bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens need {256 + len(SPECIAL_TOKENS)} at least; 1024 suits the demo world."
        )
        raise ConfigError(msg)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(SPECIAL_TOKENS[1:-1]),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast, plan: Plan) -> LlamaForCausalLM:
    """A fresh fp32 Llama for the tokenizer, seeded by the plan; the caller's random state is kept."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.width,
        intermediate_size=3 * plan.width,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return LlamaForCausalLM(config)


def pack_rows(conversations: Sequence[Sequence[int]], row_tokens: int, pad: int) -> list[Row]:
    """The conversations in their order, each whole, in rows filled up with `pad`."""
    longest = max((len(ids) for ids in conversations), default=0)
    if longest > row_tokens:
        msg = (
            f"a conversation has {longest} tokens and Plan.row_tokens is {row_tokens}; "
            f"set it to {longest} or more"
        )
        raise ConfigError(msg)
    rows: list[list[Sequence[int]]] = [[]]
    room = row_tokens
    for ids in conversations:
        if len(ids) > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(ids)
        room -= len(ids)
    return [_row(parts, row_tokens, pad) for parts in rows if parts]


def _row(parts: Sequence[Sequence[int]], row_tokens: int, pad: int) -> Row:
    num_padding = row_tokens - sum(map(len, parts))
    padding = [pad] * num_padding
    return Row(
        torch.tensor([*(i for ids in parts for i in ids), *padding]),
        torch.tensor([*(p for ids in parts for p in range(len(ids))), *range(num_padding)]),
        torch.tensor(
            [*(i for ids in parts for i in (IGNORED, *ids[1:])), *([IGNORED] * num_padding)]
        ),
    )


def rows_loss(model: LlamaForCausalLM, rows: Sequence[Row]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the rows' tokens in nats, each conversation on its own.

    Without an attention mask transformers takes positions that start again for a new sequence.
    """
    ids, positions, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def train_steps(model: LlamaForCausalLM, rows: Sequence[Row], plan: Plan) -> Iterator[Progress]:
    """Trains the model in place, a step for each item taken: AdamW, warm-up and cosine, in fp32.

    Raises `NumericsError` before an update with a loss that is not finite.
    """
    order = np.random.default_rng(plan.seed)
    num_batches = -(-len(rows) // plan.rows_per_step)
    num_steps = num_batches * plan.epochs
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": plan.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    step = 0
    for _ in range(plan.epochs):
        for batch in np.array_split(order.permutation(len(rows)), num_batches):
            for group in optimiser.param_groups:
                group["lr"] = plan.learning_rate * _schedule(step, num_steps, plan.warmup_fraction)
            loss = rows_loss(model, [rows[i] for i in batch])
            if not torch.isfinite(loss):
                msg = f"pretraining: the loss of step {step} is {loss.item()}; lower learning_rate"
                raise NumericsError(msg)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            yield Progress(step, num_steps, loss.item())
    model.eval()


def _schedule(step: int, num_steps: int, warmup_fraction: float) -> float:
    """The factor on the learning rate: linear up, then half a cosine down to a tenth."""
    warmup = max(1, round(warmup_fraction * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def pretrain(
    directory: str | Path,
    conversations: Sequence[Conversation],
    plan: Plan | None = None,
    on_step: Callable[[Progress], None] = lambda _: None,
) -> float:
    """Trains tokenizer and model on the conversations and saves both in the directory.

    Returns the mean loss of the last tenth of the steps, in nats per token. The same conversations,
    plan and number of threads give the same weights.
    """
    plan = plan or Plan()
    tokenizer = train_tokenizer(
        [message.content for conversation in conversations for message in conversation],
        plan.vocabulary,
    )
    ids = encode(tokenizer, conversations)
    rows = pack_rows(ids, plan.row_tokens, int(tokenizer.pad_token_id))
    model = build_model(tokenizer, plan)
    losses = []
    for progress in train_steps(model, rows, plan):
        losses.append(progress.loss)
        on_step(progress)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def encode(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation]
) -> list[list[int]]:
    """The token ids of each conversation as the chat template writes it."""
    messages = [[m._asdict() for m in conversation] for conversation in conversations]
    texts = tokenizer.apply_chat_template(messages, tokenize=False)
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
