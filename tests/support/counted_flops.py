"""What FlopCounterMode leaves out on a CPU, so that FLOPs can be counted to the last product.

It knows neither the CPU's attention kernels nor the in-place `addmm_` that sums the head's weight
gradient, so both get a formula here. Attention is counted as the causal part of every call that is really
made, 4 * width * (q * (k - q) + q^2 / 2) for q queries over k keys; the shapes come from the calls, so
attention over a whole row would be seen.
"""

from collections.abc import Callable
from typing import Any

import torch


def causal_flops(query: Any, key: Any) -> int:
    """One attention call forward, from [batch, heads, queries, dim] and keys alike."""
    batch, heads, q, dim = query
    k = key[2]
    return int(4 * batch * heads * dim * (q * (k - q) + q * q / 2))


def attention_forward(query: Any, key: Any, *_: Any, **__: Any) -> int:
    return causal_flops(query, key)


def attention_backward(grad: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Twice forward, as for any product (recomputed scores are not counted as useful)."""
    return 2 * causal_flops(query, key)


def addmm(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


aten = torch.ops.aten
COUNTED: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten.addmm_: addmm,
}
