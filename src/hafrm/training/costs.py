"""What a step costs, by arithmetic: floating-point operations and bytes from counts of weights and tokens.

No tensor and no model comes in: `hafrm.training.shadow` counts the weights of a run's model and the bytes
of its activations without allocating either. FLOPs are those of products and attention, two for each
multiply-add, as `torch.utils.flop_counter` counts; bytes are those of one rank at its fullest moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hafrm.engine.logprobs import chunk_rows

FLOAT32 = 4
"""Bytes of what is trained, of its gradient, and of each of AdamW's two moments."""
HALF = 2
"""Bytes of bfloat16."""


@dataclass(frozen=True)
class Counts:
    """A model's weights by what they cost; numbers of elements, but where bytes are named."""

    layers: int
    width: int
    """Of the hidden states."""
    attention_width: int
    """Heads times head size."""
    vocab: int
    matrices: int
    """What multiplies every token in the backbone: no embedding, no adapter; a token's share of experts."""
    adapters: int
    """LoRA's matrices; without any, all of the backbone is trained."""
    spared: int
    """Of `matrices`: what the last layer runs only for tokens that a head reads."""
    spared_adapters: int
    """Of `adapters`, likewise."""
    head: int
    """Policy head: width times vocabulary; 0 where none is trained."""
    trainable: int
    frozen: int
    frozen_bytes: int
    layer: int
    """All weights of the largest layer."""
    layer_trainable: int
    outside: int
    """Weights of no layer, such as embeddings and policy head; the reward head is left out."""
    outside_trainable: int

    @property
    def total(self) -> int:
        """All weights, shared ones once."""
        return self.trainable + self.frozen


@dataclass(frozen=True)
class Work:
    """How much one or several packed rows hold."""

    tokens: int
    scored: int
    """Response tokens, each with a log-prob."""
    attention: float
    """Query-key pairs: q (k - q) + q^2 / 2 of every causal segment of q queries over k keys."""
    prompts: int = 0
    responses: int = 0

    def unread(self, counts: Counts) -> int:
        """Tokens that no head reads: log-probs read the responses and each prompt's last token, rewards
        alone the last token of each response."""
        return self.tokens - (self.scored + self.prompts if counts.head else self.responses)


def work_of(shape: Sequence[tuple[int, Sequence[int]]]) -> Work:
    """The work of rows of (prompt length, response lengths), each prompt laid out once."""
    attention = 0.0
    for prompt, branches in shape:
        for number, length in enumerate(branches):
            queries = length + (prompt if number == 0 else 0)
            attention += queries * (prompt + length - queries) + queries**2 / 2
    scored = sum(sum(branches) for _, branches in shape)
    tokens = sum(prompt for prompt, _ in shape) + scored
    responses = sum(len(branches) for _, branches in shape)
    return Work(tokens, scored, attention, prompts=len(shape), responses=responses)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by where they are spent."""

    backbone: int
    attention: float
    head: int

    @property
    def total(self) -> float:
        """All of them."""
        return self.backbone + self.attention + self.head


def step_flops(counts: Counts, work: Work, *, checkpointing: bool = False) -> Flops:
    """FLOPs of forward and backward.

    A product costs 2 per weight and token forward, 2 for the gradient of its input and 2 for that of its
    weight, which a frozen one lacks; checkpointing adds one forward of the backbone. The head makes its
    logits twice when it is trained (8 in all), once when it is frozen and gives its gradient in forward
    (4). At most a few per cent too high: LoRA needs no gradient at the first layer's input, and
    checkpointing does not repeat a layer's last product.
    """
    again = 2 if checkpointing else 0
    base = (4 if counts.adapters else 6) + again
    unread = work.unread(counts)
    matrices = work.tokens * counts.matrices - unread * counts.spared
    adapters = work.tokens * counts.adapters - unread * counts.spared_adapters
    return Flops(
        backbone=base * matrices + (6 + again) * adapters,
        attention=(4 if checkpointing else 3) * attention_flops(counts, work),
        head=(4 if counts.adapters else 8) * counts.head * work.scored,
    )


def reference_flops(counts: Counts, work: Work) -> Flops:
    """FLOPs of the reference's pass: forward only, adapters included, since they are in place."""
    spared = work.unread(counts) * (counts.spared + counts.spared_adapters)
    return Flops(
        backbone=2 * (work.tokens * (counts.matrices + counts.adapters) - spared),
        attention=attention_flops(counts, work),
        head=2 * counts.head * work.scored,
    )


def attention_flops(counts: Counts, work: Work) -> float:
    """Attention forward in all layers: two products over every query-key pair."""
    return 4 * counts.layers * counts.attention_width * work.attention


@dataclass(frozen=True)
class Bytes:
    """What one rank holds at its fullest moments: in a step's backward pass, and in passes without one."""

    weights: int
    gradients: int
    optimiser: int
    exchange: int
    """Buckets of DDP, or gathered layers and whole gradients of FSDP2."""
    activations: int
    """What autograd keeps of the micro-batch."""
    logprobs: int
    """A chunk of logits with its copies, and the head's gradient on its way."""
    temporaries: int
    """What else the backward pass holds at once; never at the same time as `logprobs`."""
    passes: int
    """The fullest pass without gradients: the reference's, before the first step and over whole weights
    under FSDP2 too, or validation's beside the optimiser's state."""

    @property
    def states(self) -> int:
        """What stays, however large the micro-batch."""
        return self.weights + self.gradients + self.optimiser + self.exchange

    @property
    def step(self) -> int:
        """The fullest moment of a step."""
        return self.states + self.activations + max(self.logprobs, self.temporaries)

    @property
    def total(self) -> int:
        """The fullest moment of all."""
        return max(self.passes, self.step)


def logprob_bytes(counts: Counts, work: Work, *, device: str, product: int, stored: int) -> int:
    """Bytes that `token_logprobs` holds at its fullest, for products in `product` bytes a number and a
    head stored in `stored`.

    float32 products share one buffer of logits, others bring a new one, and the last is still referred
    to when the next is made. A frozen head keeps a second copy, of this chunk and of the last; a trained
    one sums its gradient in float32.
    """
    if not counts.head:
        return 0
    rows = min(work.scored, chunk_rows(counts.vocab, device))
    chunk, following = (n * counts.vocab for n in (rows, min(rows, work.scored - rows)))
    copied = product * (counts.head if product != stored else 0)
    if counts.adapters:
        logits, gradient = FLOAT32 * (2 * chunk + following), 0
    elif product == FLOAT32:
        logits, gradient = FLOAT32 * chunk, FLOAT32 * counts.head
    else:
        logits = (FLOAT32 + product) * chunk + FLOAT32 * following
        gradient = 2 * FLOAT32 * counts.head
    # Hidden states that predict a response token: kept, their gradient, and that spread over all tokens.
    predicting = FLOAT32 * counts.width * (2 * work.scored + work.tokens)
    return logits + gradient + copied + predicting


def reading_bytes(counts: Counts, work: Work, *, device: str, product: int, stored: int) -> int:
    """The same for a pass without gradients, such as the reference's: logits, the rows they are of, and all
    last hidden states."""
    if not counts.head:
        return 0
    chunks = 1 if product == FLOAT32 else 2
    rows = min(work.scored, chunk_rows(counts.vocab, device))
    logits = chunks * FLOAT32 * rows * counts.vocab
    copied = product * (counts.head if product != stored else 0)
    return logits + copied + FLOAT32 * counts.width * (work.scored + work.tokens)


def copies_bytes(counts: Counts) -> tuple[int, int, int, int]:
    """(weights, gradients, optimiser, exchange) of a rank that holds everything: alone, or under DDP,
    whose buckets the gradients are views of."""
    trained = FLOAT32 * counts.trainable
    return trained + counts.frozen_bytes, trained, 2 * trained, 0


def host_bytes(counts: Counts, *, half: bool) -> int:
    """Bytes of host memory that the main rank holds at its fullest: a checkpoint with AdamW's moments, or
    an export, whose gathered weights are merged with adapters in float32 and cast to the dtype stored."""
    checkpoint = 3 * FLOAT32 * counts.trainable
    gathered = FLOAT32 * counts.trainable + counts.frozen_bytes
    merged = FLOAT32 * counts.total if counts.adapters else 0
    return max(checkpoint, gathered + merged + (HALF * counts.total if half else 0))


def shards_bytes(
    counts: Counts, ranks: int, *, gathered: int, accumulates: bool
) -> tuple[int, int, int, int]:
    """(weights, gradients, optimiser, exchange) of a rank of FSDP2, layers gathered in `gathered` bytes a
    number.

    Gathered at once: this layer and the next, and what is outside of layers, which stays gathered from
    forward to backward. On their way: the gradients of one layer, as they are and in float32, and those
    of the outside. Where a step has several micro-batches (`accumulates`), gradients stay whole on every
    rank until the last.
    """
    weights, gradients, optimiser, _ = (-(-part // ranks) for part in copies_bytes(counts))
    exchange = gathered * (2 * counts.layer + counts.outside)
    exchange += (gathered + FLOAT32) * counts.layer_trainable + gathered * counts.outside_trainable
    if accumulates:
        exchange += FLOAT32 * counts.trainable
    return weights, gradients, optimiser, exchange
