"""What is not finite never reaches the weights, also where the host looks only once in many steps."""

import pytest
import torch

from hafrm.errors import NumericsError
from hafrm.training.step import NonFiniteCheck
from support.step_pairs import micro_batches, pairs


def an_optimizer() -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    parameter = torch.nn.Parameter(torch.ones(3))
    return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)


class Unwatched(NonFiniteCheck):
    """A guard as on a GPU: nothing is looked at before somebody asks."""

    def check_now(self) -> None:
        """Left to the caller."""


def test_a_broken_step_and_all_after_it_leave_weights_and_moments_until_the_host_looks():
    parameter, optimizer = an_optimizer()
    guard = Unwatched(torch.device("cpu"))
    batches = micro_batches(pairs(), 40)
    for step, finite in enumerate((True, False, True)):
        parameter.grad = torch.full((3,), 1.0 + step)
        flags = torch.tensor([True] * len(batches) + [finite])
        guard.protect(optimizer, batches, flags)
        optimizer.step()
        if step == 0:
            after_first = parameter.detach().clone()
            moments = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    assert not torch.equal(after_first, torch.ones(3))
    assert torch.equal(parameter.detach(), after_first)
    for name, value in moments.items():
        assert torch.equal(optimizer.state[parameter][name], value), name
    with pytest.raises(NumericsError, match="gradient of this step is not finite"):
        guard.check()


def test_the_groups_named_are_those_of_the_first_broken_step():
    _, optimizer = an_optimizer()
    guard = Unwatched(torch.device("cpu"))
    first, second, third = ([batch] for batch in micro_batches(pairs(), 40)[:3])
    for batches, finite in ((first, True), (second, False), (third, False)):
        guard.protect(optimizer, batches, torch.tensor([finite, True]))
    with pytest.raises(NumericsError) as caught:
        guard.check()
    assert all(name in str(caught.value) for name in second[0].ids)
    assert not any(f"{name}," in str(caught.value) for name in first[0].ids)


def test_finite_steps_pass_and_are_forgotten():
    _, optimizer = an_optimizer()
    guard = Unwatched(torch.device("cpu"))
    for _ in range(3):
        guard.protect(optimizer, micro_batches(pairs(), 40), torch.tensor([True]))
    guard.check()
    assert guard._unchecked == []
