"""A mixture of experts: equal to the dense computation, dropless, and balanced by nothing but the global batch."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from runtime.data.loader import Batch
from runtime.model.config import ModelConfig
from runtime.model.counts import count
from runtime.model.decoder import Decoder
from runtime.model.experts import MixtureOfExperts
from runtime.model.grouped import grouped_product
from runtime.model.initialization import initialize
from runtime.optim.balance import imbalance, update_router_biases
from runtime.step import train_step
from tests.workers import run_workers

SHAPE = {"num_layers": 4, "hidden_size": 8, "intermediate_size": 10, "num_heads": 2, "vocab_size": 31}
EXPERTS = {"count": 4, "top_k": 2}


def config(experts: dict = EXPERTS, **options) -> ModelConfig:
    return ModelConfig(**SHAPE, experts=EXPERTS | experts, **options)


def mixture_of(model: ModelConfig, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> MixtureOfExperts:
    """With weights of order one, and a bias of this size."""
    torch.manual_seed(0)
    mixture = MixtureOfExperts(model).to(dtype)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_()
        mixture.router.bias.mul_(spread)
    return mixture


def by_hand(mixture: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, weighted by zero where the token was not sent."""
    options = mixture.options
    probabilities = (x @ mixture.router.weight.T).softmax(-1)
    scores = probabilities.detach() + (mixture.router.bias if options.balance == "bias" else 0)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    shares = probabilities * (rank < options.top_k)
    if options.normalize:
        shares = shares / shares.sum(-1, keepdim=True)
    answers = []
    for expert in mixture.experts:
        gate, up, down = (each.weight for each in (expert.gate_proj, expert.up_proj, expert.down_proj))
        answers.append((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return (torch.stack(answers, -1) * shares.unsqueeze(-2)).sum(-1)


CASES = [
    {},
    {"normalize": False},
    {"top_k": 1, "normalize": False},
    {"top_k": 4},
    {"balance": "none"},
    {"balance": "loss"},
    {"count": 7, "top_k": 3},
]


@pytest.mark.parametrize("experts", CASES, ids=str)
def test_it_is_the_dense_computation(experts):
    mixture = mixture_of(config(experts))
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(each for each in mixture.parameters() if each.requires_grad)]
    found, wanted = mixture(x)[0], by_hand(mixture, x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    pairs = (torch.autograd.grad(each, parameters, upstream) for each in (found, wanted))
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_no_token_is_dropped_however_uneven_the_choice():
    mixture = mixture_of(config())
    with torch.no_grad():
        mixture.router.bias.copy_(torch.tensor([9.0, 0.0, 9.0, 0.0]))
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    y, balance = mixture(x)
    assert balance.counts.tolist() == [32, 0, 32, 0]
    torch.testing.assert_close(y, by_hand(mixture, x))
    y.sum().backward()
    assert not mixture.experts[1].up_proj.weight.grad.any() and mixture.experts[0].up_proj.weight.grad.any()


def test_the_bias_chooses_and_does_not_weigh():
    mixture = mixture_of(config({"top_k": 4}))
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    before = mixture(x)[0]
    with torch.no_grad():
        mixture.router.bias += torch.tensor([3.0, 1.0, 2.0, 0.0])
    torch.testing.assert_close(mixture(x)[0], before)
    assert not mixture.router.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ends", [[20, 37, 37, 40], [0, 0, 0, 40]], ids=str)
def test_products_of_groups_of_rows(ends, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, dtype=dtype, generator=generator, requires_grad=True)
    weights = [torch.randn(5, 6, dtype=dtype, generator=generator, requires_grad=True) for _ in ends]
    found = grouped_product(x, weights, torch.tensor(ends))
    starts = [0, *ends[:-1]]
    wanted = torch.cat([x[start:end] @ w.T for start, end, w in zip(starts, ends, weights, strict=True)])
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found)
    for one, two in zip(*(torch.autograd.grad(y, [x, *weights], upstream) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, two)


# Balance


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_loss_of_a_sequence_is_deepseeks(top_k):
    """alpha T sum_e f_e P_e, f_e = E / (K T) choices of e, P_e = mean probability (arXiv 2412.19437, eq. 17 to 20)."""
    model = config({"balance": "loss", "top_k": top_k, "normalize": False, "loss_weight": 0.3})
    mixture = mixture_of(model)
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    total = 0.0
    for sequence in x:
        probabilities = (sequence @ mixture.router.weight.T).softmax(-1)
        chosen = probabilities.topk(top_k).indices.flatten().bincount(minlength=4)
        total += 0.3 * 9 * float((4 / (top_k * 9) * chosen * probabilities.mean(0)).sum())
    assert float(mixture(x)[1].loss) == pytest.approx(total)
    assert float(mixture(x)[1].loss) == pytest.approx(sum(float(mixture(each[None])[1].loss) for each in x))


def test_an_even_choice_costs_the_weight_for_each_token():
    mixture = mixture_of(config({"balance": "loss", "top_k": 4, "loss_weight": 0.3}))
    assert float(mixture(torch.randn(2, 9, 8, dtype=torch.float64))[1].loss) == pytest.approx(0.3 * 18)


def test_a_bias_moves_against_the_choices_unless_the_step_is_skipped():
    decoder = Decoder(config({"bias_rate": 0.5}, tying={"plan": "cycle", "loops": 2}))
    counts = torch.tensor([[4.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 8.0]], dtype=torch.float64)
    update_router_biases(decoder, counts, torch.tensor(1.0))
    assert not any(block.feed_forward.router.bias.any() for block in decoder.blocks)
    update_router_biases(decoder, counts, torch.tensor(0.0))
    moved = [block.feed_forward.router.bias.tolist() for block in decoder.blocks]
    assert moved == [[-0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.5, -0.5]]
    assert float(imbalance(counts)) == 4.0


FROZEN = {"count": 2, "prefix_tokens": 3, "backbone": "frozen"}


@pytest.mark.parametrize(
    "options",
    [{"experts": {"balance": "loss"}}, {"experts": {"balance": "none"}}, {"streams": FROZEN}],
    ids=["loss", "none", "frozen"],
)
def test_a_bias_that_does_not_balance_or_is_frozen_stays(options):
    decoder = Decoder(config(**options))
    update_router_biases(decoder, torch.arange(16.0).view(4, 4), torch.tensor(0.0))
    assert not any(block.feed_forward.router.bias.any() for block in decoder.blocks)


@pytest.mark.parametrize("tying", [{}, {"plan": "cycle", "loops": 2, "own_norms": True}], ids=["untied", "WideNet"])
def test_choices_of_all_uses_of_a_block_count(tying):
    decoder = Decoder(config(tying=tying))
    initialize(decoder, 0)
    tokens = torch.arange(24).view(2, 12) * 7 % 31
    loss = decoder(tokens[:, :-1], tokens[:, 1:])
    uses = 4 // decoder.config.num_blocks
    assert loss.expert_counts.sum(1).tolist() == [2 * 11 * 2 * uses] * decoder.config.num_blocks
    loss.total.backward()
    assert all(each.grad is not None for each in decoder.parameters() if each.requires_grad)
    assert sum(each.numel() for each in decoder.parameters()) == count(decoder.config).total


def test_experts_and_own_norms_share_all_but_the_norms():
    """WideNet (Xue et al. 2021, arXiv 2107.11817): one block of experts at every depth, each with its own norms."""
    tying = {"plan": "cycle", "loops": 4, "own_norms": True}
    wide, dense = config(tying=tying), ModelConfig(**SHAPE, tying=tying)
    hidden, units = 8, 10
    assert wide.num_blocks == 1
    assert count(wide).total - count(dense).total == 3 * (3 * hidden * units) + 4 * hidden + 4
    assert count(wide).active - count(dense).active == (3 * hidden * units) + 4 * hidden + 4


def steps(rank: int, balance: str, share: int, micro: int) -> tuple[list[float], list, list]:
    """Three steps of a model on this rank's share of 4 sequences: losses, biases and a weight."""
    speed = {"bias": {"bias_rate": 0.05}, "loss": {"loss_weight": 1.0}}[balance]
    decoder = Decoder(config({"balance": balance, **speed}))
    initialize(decoder, 0)
    parameters = list(decoder.parameters())
    optimizer = torch.optim.SGD([each for each in parameters if each.requires_grad], lr=0.5)
    losses = []

    def update(skip):
        # The whole step is a sum over ranks, as FSDP makes it.
        for each in parameters:
            if each.grad is not None:
                dist.all_reduce(each.grad)
        optimizer.step()

    for step in range(3):
        tokens = torch.randint(31, (4, 13), generator=torch.Generator().manual_seed(step))
        own = tokens[rank * share : (rank + 1) * share]
        batches = [Batch(each[:, :-1], each[:, 1:], None) for each in own.split(micro)]
        result = train_step(
            decoder,
            parameters,
            batches,
            judge=lambda loss, norm: torch.zeros(()),
            update=update,
            grad_clip=0.0,
            data_group=dist.group.WORLD,
        )
        losses.append(float(result.loss))
        assert result.imbalance > 1
    biases = [block.feed_forward.router.bias.tolist() for block in decoder.blocks]
    return losses, biases, decoder.blocks[0].feed_forward.router.weight.flatten().tolist()


def runs(rank: int, world_size: int) -> list:
    share = 4 // world_size
    return [[steps(rank, balance, share, micro) for micro in (share, 1)] for balance in ("bias", "loss")]


def test_no_micro_batch_and_no_mesh_changes_the_result():
    alone, together = (run_workers(runs, ranks, ranks)[0] for ranks in (1, 2))
    for (whole, *others), more in zip(alone, together, strict=True):
        for losses, biases, weights in [*others, *more]:
            assert biases == whole[1]
            assert losses == pytest.approx(whole[0], rel=2e-6)
            assert weights == pytest.approx(whole[2], abs=1e-6)
    assert any(map(any, alone[0][0][1])) and not any(map(any, alone[1][0][1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("counts", [[40, 24, 56, 8], [0, 128, 0, 0], [1, 5, 90, 32]], ids=str)
def test_torchs_grouped_product_is_that_of_the_loop(counts, monkeypatch):
    """In bf16, against the loop in float64; gradients too, also of experts without a token."""
    ends = torch.tensor(counts, device="cuda").cumsum(0)
    shapes = [(sum(counts), 64), (sum(counts), 48), *[(48, 64)] * len(counts)]
    x, outer, *weights = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    calls, kernel, found = [], torch._grouped_mm, []
    monkeypatch.setattr(torch, "_grouped_mm", lambda *given, **named: calls.append(1) or kernel(*given, **named))
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [each.detach().to(dtype).requires_grad_() for each in (x, *weights)]
        y = grouped_product(inputs[0], inputs[1:], ends)
        y.backward(outer.to(dtype))
        found.append([y.detach().double(), *(each.grad.double() for each in inputs)])
        assert len(calls) == 3, "the kernel's forward and both of its gradients, and none of the loop's"
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 1e-2 * exact.norm()
