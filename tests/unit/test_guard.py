"""The step guard's decisions and its window."""

import math

import pytest
import torch

from runtime.resilience.guard import StepGuard


def judge(guard, loss, grad_norm=1.0):
    return guard.judge(torch.tensor(loss), torch.tensor(grad_norm)).item()


def ordinary(number, seed=0):
    """Losses and gradient norms of an uneventful run."""
    generator = torch.Generator().manual_seed(seed)
    return (2 + 0.1 * torch.randn(number, 2, generator=generator)).tolist()


@pytest.mark.parametrize("sigma", [None, 6.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_step_that_is_not_finite_is_skipped_from_the_first_on(sigma, value, place):
    step = [2.0, 1.0]
    step[place] = value
    guard = StepGuard(sigma, 4, "cpu")
    assert judge(guard, *step) == 1.0
    assert judge(guard, 2.0, 1.0) == 0.0


def test_the_skip_flag_is_what_the_fused_kernels_take():
    flag = StepGuard(None, 4, "cpu").judge(torch.tensor(1.0), torch.tensor(1.0))
    assert flag.dtype == torch.float32 and flag.shape == ()


@pytest.mark.parametrize("place", [0, 1])
def test_an_outlier_of_loss_or_of_norm_is_skipped_at_sigma_deviations(place):
    values = torch.tensor(ordinary(128))
    deviation, mean = torch.std_mean(values.double(), dim=0)
    for distance, skipped in ((5.99, 0.0), (6.01, 1.0), (-100.0, 0.0)):
        guard = StepGuard(6.0, 128, "cpu")
        for step in values.tolist():
            assert judge(guard, *step) == 0.0
        step = mean.clone()
        step[place] += distance * deviation[place]
        assert judge(guard, *step.tolist()) == skipped


def test_without_sigma_only_steps_that_are_not_finite_are_skipped():
    guard = StepGuard(None, 8, "cpu")
    assert [judge(guard, *step) for step in ordinary(8)] == [0.0] * 8
    assert judge(guard, 1e30, 1e30) == 0.0


def test_outliers_pass_until_half_the_window_is_there():
    steps = ordinary(64)
    early, ready = StepGuard(6.0, 128, "cpu"), StepGuard(6.0, 128, "cpu")
    for step in steps[:63]:
        judge(early, *step)
    for step in steps:
        judge(ready, *step)
    assert judge(early, 100.0, 100.0) == 0.0
    assert judge(ready, 100.0, 100.0) == 1.0


def test_a_run_without_any_spread_is_not_skipped():
    guard = StepGuard(3.0, 128, "cpu")
    assert {judge(guard, 2.1, 0.7) for _ in range(300)} == {0.0}


def test_skipped_steps_do_not_enter_the_window():
    """However many outliers come, the next one is still an outlier, and an ordinary step still is none."""
    guard = StepGuard(6.0, 16, "cpu")
    for step in ordinary(16):
        judge(guard, *step)
    before = {name: tensor.clone() for name, tensor in guard.tensors().items()}
    assert [judge(guard, 50.0) for _ in range(40)] == [1.0] * 40
    for name in ("values", "accepted"):
        assert torch.equal(guard.tensors()[name], before[name])
    assert judge(guard, 2.0, 2.0) == 0.0


def test_the_window_holds_the_latest_accepted_steps():
    guard = StepGuard(None, 4, "cpu")
    for loss in [1.0, 2.0, math.nan, 3.0, 4.0, math.inf, 5.0, 6.0]:
        judge(guard, loss)
    assert sorted(guard.tensors()["values"][:, 0].tolist()) == [3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("at", [3, 40, 90])
def test_a_restored_guard_goes_on_alike(at):
    steps = ordinary(60)
    for place in range(5, 60, 7):
        steps[place][place % 2] *= 10
    steps += [[math.nan, 1.0]] * 3 + ordinary(60, seed=1)
    whole = StepGuard(4.0, 32, "cpu")
    expected = [judge(whole, *step) for step in steps]
    first, second = StepGuard(4.0, 32, "cpu"), StepGuard(4.0, 32, "cpu")
    found = [judge(first, *step) for step in steps[:at]]
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    found += [judge(second, *step) for step in steps[at:]]
    assert found == expected and 3 < sum(expected) < len(steps) / 2
    for name, tensor in second.tensors().items():
        assert torch.equal(tensor, whole.tensors()[name])


@pytest.mark.parametrize("sigma", [None, 6.0])
def test_judging_never_reads_the_device(sigma):
    """On the meta device there is nothing to read: any decision of the host would raise."""
    guard = StepGuard(sigma, 8, "meta")
    for _ in range(3):
        assert guard.judge(torch.empty((), device="meta"), torch.empty((), device="meta")).device.type == "meta"
