"""Log-probs of chosen tokens from hidden states, without a `[tokens, vocabulary]` matrix.

Logits exist for one chunk at a time and are recomputed in backward; for a frozen head the gradient is
computed in forward and nothing is recomputed. Products run in the dtype of the hidden states, all else in
float32, including the output (a bfloat16 output alone costs 0.38 nat over 300 tokens). Logits instead of
log-probs need only the targets' rows of the head, all in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Logits held at a time: 64 and 512 MiB in float32. A trained head's backward adds a float32 gradient of the
# whole head for each chunk, so on a GPU fewer chunks mean less traffic.
_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}


@dataclass(frozen=True)
class LogitTransform:
    """What happens to `W h + b` before the softmax: `cap * tanh(scale * z / cap) / temperature`."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0  # of sampling responses, not the model's own
    normalised: bool = True  # False: a token's logit stands for its log-prob (method dpo-logits)

    def apply_(self, z: Tensor) -> Tensor:
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.div_(self.temperature) if self.temperature != 1.0 else z

    def chain_(self, grad: Tensor, logits: Tensor | None) -> Tensor:
        """d/dz from d/dlogits, overwrites `grad`; tanh' = 1 - tanh^2."""
        if self.softcap is not None:
            assert logits is not None
            grad.mul_(1.0 - (logits * (self.temperature / self.softcap)).square())
        factor = self.scale / self.temperature
        return grad.mul_(factor) if factor != 1.0 else grad


def chunk_rows(vocab: int, device: str) -> int:
    """Number of tokens whose logits exist at once on a device of this type."""
    return max(1, _CHUNK_ELEMENTS["cuda" if device == "cuda" else "cpu"] // vocab)


def token_logprobs(
    hidden: Float[Tensor, "scored hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " scored"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    transform: LogitTransform | None = None,
    chunk: int | None = None,
) -> Float[Tensor, " scored"]:
    """log softmax(transform(W h + b))[target] of every token, float32, differentiable in h, W and b; the
    logit itself if `transform` is not normalised."""
    transform = transform or LogitTransform()
    if not transform.normalised:
        z = (hidden.float() * weight[targets].float()).sum(-1)
        z = (z if bias is None else z + bias[targets].float()) * transform.scale
        cap = transform.softcap
        return (z if cap is None else cap * torch.tanh(z / cap)) / transform.temperature
    chunk = chunk or chunk_rows(weight.shape[0], weight.device.type)
    apply: Any = _TokenLogProbs.apply
    logprobs: Tensor = apply(hidden, weight, bias, targets, transform, chunk)
    return logprobs


@torch.no_grad()
def token_entropies(
    hidden: Float[Tensor, "scored hidden"],
    weight: Float[Tensor, "vocab hidden"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    transform: LogitTransform | None = None,
    chunk: int | None = None,
) -> Float[Tensor, " scored"]:
    """Entropy (nat, float32) of the distribution that each state predicts; by chunks, without gradient."""
    chunk = chunk or chunk_rows(weight.shape[0], weight.device.type)
    transform = transform or LogitTransform()
    h, w = _operands(hidden, weight)
    entropies = torch.empty(len(h), dtype=torch.float32, device=h.device)
    buffer = _buffer(chunk, h, w)
    for rows in _chunks(len(h), chunk):
        logps = _logits(h[rows], w, bias, transform, buffer).log_softmax(-1)
        entropies[rows] = -(logps.exp() * logps).sum(-1)
    return entropies


def final_logits(
    hidden: Float[Tensor, "scored hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    transform: LogitTransform,
) -> Float[Tensor, "scored vocab"]:
    """transform(W h + b), float32: the whole matrix, so only for few tokens."""
    h, w = _operands(hidden, weight)
    return _logits(h, w, bias, transform, None)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk: int,
    ) -> Tensor:
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        gradient_now = frozen and hidden.requires_grad
        h, w = _operands(hidden, weight)
        normaliser = torch.empty(len(h), dtype=torch.float32, device=h.device)
        logprobs = torch.empty_like(normaliser)
        slope = torch.empty_like(hidden) if gradient_now else None
        buffer = _buffer(chunk, h, w)
        for rows in _chunks(len(h), chunk):
            logits = _logits(h[rows], w, bias, transform, buffer)
            target = targets[rows, None]
            picked = logits.gather(1, target)[:, 0]
            copy = logits if slope is None else logits.clone()
            # log-sum-exp written over the logits: a fresh matrix per operation costs more than it does
            highest = logits.amax(dim=1)
            total = logits.sub_(highest[:, None]).exp_().sum(dim=1)
            normaliser[rows] = highest + total.log()
            logprobs[rows] = picked - normaliser[rows]
            if slope is not None:
                ones = torch.ones_like(normaliser[rows])
                grad = _grad_z(copy, normaliser[rows], target, ones, transform)
                slope[rows] = _matmul(grad.to(w.dtype), w).to(slope.dtype)
        ctx.transform, ctx.chunk, ctx.frozen = transform, chunk, frozen
        ctx.dtype = h.dtype  # backward runs outside autocast, yet must recompute the same logits
        if gradient_now:
            ctx.save_for_backward(slope)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        upstream = grads[0]
        if ctx.frozen:
            (slope,) = ctx.saved_tensors
            return (slope * upstream[:, None]).to(slope.dtype), None, None, None, None, None
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        grad_h = torch.empty_like(hidden) if need_hidden else None
        grad_w = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if need_weight else None
        grad_b = torch.zeros(len(w), dtype=torch.float32, device=w.device) if need_bias else None
        buffer = _buffer(ctx.chunk, h, w)
        for rows in _chunks(len(h), ctx.chunk):
            logits = _logits(h[rows], w, bias, ctx.transform, buffer)
            target = targets[rows, None]
            grad = _grad_z(logits, normaliser[rows], target, upstream[rows], ctx.transform)
            if grad_b is not None:
                grad_b += grad.sum(0)
            grad = grad.to(w.dtype)
            if grad_h is not None:
                grad_h[rows] = _matmul(grad, w).to(grad_h.dtype)
            if grad_w is not None and grad.dtype == torch.float32:
                grad_w.addmm_(grad.t(), h[rows])
            elif grad_w is not None:
                grad_w += _matmul(grad.t(), h[rows])
        grad_w = grad_w.to(weight.dtype) if grad_w is not None else None
        grad_b = grad_b.to(bias.dtype) if grad_b is not None else None
        return grad_h, grad_w, grad_b, None, None, None


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in one dtype: on CUDA bfloat16 if autocast or the weights use it."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    if not hidden.is_cuda:
        dtype = torch.float32  # a CPU's half-precision products round their output to half
    return hidden.to(dtype), weight.to(dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in float32; autocast would round the result."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            return a @ b
        return torch.mm(a, b, out_dtype=torch.float32)


def _buffer(chunk: int, h: Tensor, w: Tensor) -> Tensor | None:
    """Room for one chunk of float32 logits."""
    if h.dtype != torch.float32:
        return None  # half-precision products with a float32 result allocate their own
    return torch.empty(min(chunk, len(h)), len(w), dtype=torch.float32, device=h.device)


def _logits(
    h: Tensor, w: Tensor, bias: Tensor | None, transform: LogitTransform, buffer: Tensor | None
) -> Tensor:
    """The chunk's final logits, in `buffer` if there is one."""
    if buffer is None:
        z = _matmul(h, w.t())
    else:
        z = buffer[: len(h)]
        with torch.autocast(h.device.type, enabled=False):
            torch.mm(h, w.t(), out=z)
    if bias is not None:
        z += bias.float()
    return transform.apply_(z)


def _grad_z(
    logits: Tensor, normaliser: Tensor, target: Tensor, upstream: Tensor, transform: LogitTransform
) -> Tensor:
    """upstream * (onehot(target) - softmax) through the transform; overwrites `logits`."""
    final = logits.clone() if transform.softcap is not None else None
    grad = logits.sub_(normaliser[:, None]).exp_().mul_(-upstream[:, None])
    grad.scatter_add_(1, target, upstream[:, None])
    return transform.chain_(grad, final)
