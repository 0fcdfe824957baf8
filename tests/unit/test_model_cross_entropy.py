"""The chunked cross-entropy equals the plain one: values and gradients."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from runtime.model.cross_entropy import EAGER, FUSIBLE, IGNORE, LinearCrossEntropy, Passes, compiled

PASSES = pytest.mark.parametrize("passes", [EAGER, FUSIBLE], ids=["eager", "fusible"])


def plain(hidden, weight, targets, z_loss):
    logits = hidden @ weight.mT
    z = (logits.logsumexp(-1).square() * (targets != IGNORE)).sum() * z_loss
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"), z


def case(rows=37, size=24, vocab_size=53, dtype=torch.float64, ignored=5):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[torch.randperm(rows, generator=generator)[:ignored]] = IGNORE
    return hidden, weight, targets


def cross_entropy(chunk: int | None, passes: Passes) -> LinearCrossEntropy:
    module = LinearCrossEntropy(chunk)
    module.passes = passes
    return module


@PASSES
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("ignored", [0, 5, 37])
@pytest.mark.parametrize("chunk", [1, 53 * 7, 53 * 37, 10**6, None])
def test_values_and_gradients_equal_the_plain_loss(chunk, ignored, z_loss, passes):
    hidden, weight, targets = case(ignored=ignored)
    loss = cross_entropy(chunk, passes)(hidden, weight, targets, z_loss)
    expected = plain(hidden, weight, targets, z_loss)
    torch.testing.assert_close(loss[:2], expected, rtol=1e-13, atol=1e-13)
    scale = 0.3
    gradients = torch.autograd.grad(scale * (loss.total), (hidden, weight))
    expected = torch.autograd.grad(scale * sum(expected), (hidden, weight))
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


@PASSES
@pytest.mark.parametrize("vocab_size", [53, 16])
def test_float32_is_within_rounding_of_float64(vocab_size, passes):
    exact = case(64, vocab_size=vocab_size)
    single = [each.detach().float().requires_grad_() for each in exact[:2]]
    loss = cross_entropy(vocab_size * 20, passes)(*single, exact[2], 1e-3)
    expected = plain(*exact, 1e-3)
    torch.testing.assert_close(loss.cross_entropy.double(), expected[0], rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss.total, single)
    for gradient, reference in zip(gradients, torch.autograd.grad(sum(expected), exact[:2]), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 1e-6 * reference.norm()


def test_numerical_gradient_of_the_sum():
    hidden, weight, targets = case(6, 4, 7, ignored=1)
    loss = LinearCrossEntropy(14)
    torch.autograd.gradcheck(lambda h, w: loss(h, w, targets, 1e-2).total, (hidden, weight))


@PASSES
def test_bf16_sums_and_accumulates_in_float32(passes):
    hidden, weight, targets = case(512, 32, 40, torch.bfloat16)
    loss = cross_entropy(40 * 16, passes)(hidden, weight, targets)
    assert loss.cross_entropy.dtype == torch.float32
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    expected, _ = plain(*exact, targets, 0.0)
    torch.testing.assert_close(loss.cross_entropy.double(), expected, rtol=2e-3, atol=0)
    gradients = torch.autograd.grad(loss.cross_entropy / 507, (hidden, weight))
    for gradient, reference in zip(gradients, torch.autograd.grad(expected / 507, exact), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - reference).norm() < 5e-3 * reference.norm()


@pytest.mark.parametrize("frozen", [True, False])
def test_without_gradients_only_the_values(frozen):
    hidden, weight, targets = case()
    expected = plain(hidden, weight, targets, 1e-2)
    if frozen:
        hidden, weight = hidden.detach(), weight.detach()
    with torch.set_grad_enabled(frozen):
        loss = LinearCrossEntropy(53 * 4)(hidden, weight, targets, 1e-2)
    assert not loss.cross_entropy.requires_grad
    torch.testing.assert_close(loss[:2], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("target", [-1, 53])
@PASSES
def test_a_target_outside_the_vocabulary_is_refused(passes, target):
    hidden, weight, targets = case()
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(None, passes)(hidden, weight, targets)


@PASSES
def test_large_logits_do_not_overflow(passes):
    hidden, weight, targets = case(dtype=torch.float32)
    with torch.no_grad():
        loss = cross_entropy(None, passes)(hidden * 1e3, weight, targets)
    assert loss.cross_entropy.isfinite()


@PASSES
def test_a_loss_that_is_not_finite_is_not_hidden(passes):
    hidden, weight, targets = case(dtype=torch.float32, ignored=0)
    with torch.no_grad():
        hidden[3, 0] = torch.nan
    assert cross_entropy(None, passes)(hidden, weight, targets).cross_entropy.isnan()


def test_compiled_the_passes_compute_the_same_in_place():
    """With a last chunk of fewer rows, as a GPU's loss has it. How often a kernel reads is not looked at."""
    hidden, weight, targets = case(64, vocab_size=4096, dtype=torch.bfloat16)
    torch.compiler.reset()

    def step(passes):
        loss = cross_entropy(4096 * 48, passes)(hidden, weight, targets, 1e-3)
        return *loss[:2], *torch.autograd.grad(loss.total, (hidden, weight))

    found, programs = run_and_get_code(step, compiled())
    expected = step(EAGER)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-6, atol=0)
    kernels = [program.count("async_compile.cpp_pybinding(") for program in programs]
    assert kernels == [1, 1, 1, 1], "two passes, of 48 rows and of any number"
    assert not any(re.search(r"empty_strided_cpu\(\([^)]*4096", each) for each in programs), "no room for more logits"


def test_never_more_logits_than_a_chunk():
    hidden, weight, targets = case(4096, 8, 1000, torch.float32)
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    with Largest():
        loss = LinearCrossEntropy(64 * 1000)(hidden, weight, targets)
        loss.cross_entropy.backward()
    assert max(sizes) == 64 * 1000


@pytest.mark.parametrize(
    ("device", "chunk", "vocab_size", "rows"),
    [
        ("cpu", None, 4096, 256),
        ("cpu", None, 3000, 349),
        ("cpu", None, 10**6, 64),
        ("cpu", 2**27, 128256, 1024),
        ("cuda", None, 128256, 1024),
        ("cuda", None, 32000, 4096),
        ("cuda", None, 2**19, 256),
        ("cuda", None, 2**19 + 1, 255),
        ("cuda", 53 * 7, 53, 7),
        ("cuda", 1, 53, 1),
    ],
)
def test_a_gpus_chunk_has_whole_tiles_of_rows(device, chunk, vocab_size, rows):
    assert LinearCrossEntropy(chunk).chunk_rows(torch.device(device), vocab_size) == rows
