"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from runtime.optim.ema import EMA

SKIP, KEEP = torch.ones(()), torch.zeros(())


def model(*values):
    decoder = nn.Linear(len(values), 1, bias=False)
    set_weights(decoder, *values)
    return decoder


def set_weights(decoder, *values):
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([values]))


def average(ema):
    return ema.tensors()["weight"].flatten().tolist()


def bits(tensor):
    return tensor.detach().clone().view(torch.int32)


def test_after_a_half_life_half_of_the_old_average_is_left():
    decoder = model(8.0, -4.0)
    ema = EMA(decoder, half_life=100)
    set_weights(decoder, 0.0, 0.0)
    for expected in ([4.0, -2.0], [2.0, -1.0]):
        ema.update(100, KEEP)
        assert average(ema) == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [[100] * 10, [1000], [1, 99, 400, 500], [4] * 250])
def test_the_average_forgets_by_tokens_and_not_by_steps(sizes):
    decoder = model(1.0)
    ema = EMA(decoder, half_life=250)
    set_weights(decoder, 0.0)
    for size in sizes:
        ema.update(size, KEEP)
    assert average(ema) == pytest.approx([2**-4], rel=1e-5)


def test_it_is_the_weighted_sum_of_all_weights_so_far():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(20, 5, dtype=torch.float64, generator=generator)
    decoder = model(*weights[0].tolist())
    ema, expected, decay = EMA(decoder, half_life=30), weights[0], 2 ** (-7 / 30)
    for row in weights[1:]:
        set_weights(decoder, *row.tolist())
        ema.update(7, KEEP)
        expected = decay * expected + (1 - decay) * row
    assert average(ema) == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 2.0, 3.0), (float("nan"), float("inf"), -1.0)])
def test_a_skipped_step_leaves_every_bit(weights):
    decoder = model(-0.0, 0.1, 1e-42)
    ema = EMA(decoder, half_life=10)
    before = bits(ema.tensors()["weight"])
    set_weights(decoder, *weights)
    ema.update(10, SKIP)
    assert torch.equal(bits(ema.tensors()["weight"]), before)


def test_updating_reads_the_weights_and_leaves_them():
    decoder = model(0.3, 0.7)
    before = bits(decoder.weight)
    EMA(decoder, half_life=10).update(10, KEEP)
    assert torch.equal(bits(decoder.weight), before) and decoder.weight.grad is None


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_weights_come_back_to_the_bit(fails):
    decoder = model(0.1, -0.0, 1e-42, 3.3)
    ema = EMA(decoder, half_life=10)
    set_weights(decoder, 1.7, 2.3, -0.0, 1e-40)
    ema.update(3, KEEP)
    weights, averaged = bits(decoder.weight), bits(ema.tensors()["weight"])
    try:
        with ema.swapped(decoder):
            assert torch.equal(bits(decoder.weight), averaged)
            if fails:
                raise InterruptedError
    except InterruptedError:
        pass
    assert torch.equal(bits(decoder.weight), weights)
    assert torch.equal(bits(ema.tensors()["weight"]), averaged)


def test_filling_its_tensors_in_place_restores_it():
    decoder = model(1.0, 2.0)
    ema, restored = EMA(decoder, half_life=10), EMA(decoder, half_life=10)
    set_weights(decoder, 3.0, -1.0)
    ema.update(4, KEEP)
    restored.tensors()["weight"].copy_(ema.tensors()["weight"])
    for each in (ema, restored):
        each.update(4, KEEP)
    assert torch.equal(bits(ema.tensors()["weight"]), bits(restored.tensors()["weight"]))


def test_restarting_makes_it_a_copy_of_the_weights():
    decoder = model(1.0, 2.0)
    ema = EMA(decoder, half_life=10)
    set_weights(decoder, 5.0, 6.0)
    ema.restart(decoder)
    assert average(ema) == [5.0, 6.0]
    set_weights(decoder, 0.0, 0.0)
    assert average(ema) == [5.0, 6.0]
