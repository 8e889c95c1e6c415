"""Trains the demo's tokenizer and small language model, in about a minute on two cores.

The result is a plain transformers directory: a byte-level BPE with a chat template, a Llama in fp32.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hafrm.errors import NumericsError
from hafrm.progress import OnProgress, no_progress
from hafrm.training.step import build_optimizer

PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, "<|user|>", "<|assistant|>", "<|system|>", END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100  # label of a token that nothing predicts: padding, a conversation's first
MAX_LENGTH = 256  # tokens of a packed sequence
SEQUENCES_PER_STEP = 4
LEARNING_RATE, WARMUP_FRACTION, WEIGHT_DECAY = 3e-3, 0.05, 0.05
SEED = 0  # of the weights and of the order of the conversations

PackedText = Int[Tensor, "3 tokens"]
"""Ids, positions (from 0 in each conversation) and labels of consecutive conversations."""


def pretrain(
    directory: Path,
    conversations: Sequence[tuple[str, str]],
    *,
    width: int = 128,
    layers: int = 4,
    vocabulary: int = 1024,
    on_progress: OnProgress = no_progress,
) -> float:
    """Train tokenizer and model on (prompt, response) texts and save both in the directory.

    Returns the mean loss of the last tenth of the steps, in nats per token. The same arguments and number
    of threads give the same weights.
    """
    tokenizer = _train_tokenizer([t for pair in conversations for t in pair], vocabulary)
    messages = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in conversations
    ]
    texts = list(tokenizer.apply_chat_template(messages, tokenize=False))
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template wrote them
    model = _build_model(tokenizer, width, layers)
    losses = list(_train(model, _pack(ids, int(tokenizer.pad_token_id)), on_progress))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
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


def _build_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state must not change
        torch.manual_seed(SEED)
        return LlamaForCausalLM(config)


def _pack(conversations: Sequence[Sequence[int]], pad: int) -> list[PackedText]:
    """The conversations in their order, without splitting any, in sequences filled up with `pad`."""
    sequences: list[list[Sequence[int]]] = [[]]
    room = MAX_LENGTH
    for ids in conversations:
        if len(ids) > room:
            sequences.append([])
            room = MAX_LENGTH
        sequences[-1].append(ids)
        room -= len(ids)
    packed = []
    for texts in sequences:
        rest = MAX_LENGTH - sum(map(len, texts))
        # padding counts as a conversation: its positions start at 0 too
        ids = [i for text in texts for i in text] + [pad] * rest
        positions = [p for text in texts for p in range(len(text))] + [*range(rest)]
        labels = [i for text in texts for i in (IGNORED, *text[1:])] + [IGNORED] * rest
        packed.append(torch.tensor([ids, positions, labels]))
    return packed


def _train(
    model: LlamaForCausalLM, sequences: Sequence[PackedText], on_progress: OnProgress
) -> Iterator[float]:
    """One pass of AdamW with warm-up and cosine, in fp32; yields the loss of each step."""
    num_steps = -(-len(sequences) // SEQUENCES_PER_STEP)
    optimizer = build_optimizer(model, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98), eps=1e-8)
    order = np.random.default_rng(SEED).permutation(len(sequences))
    model.train()
    for step, batch in enumerate(np.array_split(order, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step, num_steps)
        ids, positions, labels = torch.stack([sequences[i] for i in batch], dim=1)
        # without an attention mask, transformers reads a restart of positions as a new sequence
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        # the mean over the step's tokens, in nats
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if not torch.isfinite(loss):
            raise NumericsError(f"pretraining the demo's model: the loss of step {step} is {loss}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_progress(step + 1, num_steps)
        yield loss.item()
    model.eval()


def _schedule(step: int, num_steps: int) -> float:
    """The factor on the learning rate: linear up, then half a cosine down to a tenth."""
    warmup = max(1, round(WARMUP_FRACTION * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
