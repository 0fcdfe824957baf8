"""What a parallelised decoder computes, besides its training loss."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from runtime.checkpoint.store import CheckpointStore
from runtime.config import ParallelConfig
from runtime.model.config import ModelConfig
from runtime.model.cross_entropy import EAGER, FUSIBLE, IGNORE, LinearCrossEntropy
from runtime.model.decoder import Decoder
from runtime.model.initialization import initialize
from runtime.parallel.fsdp import fsdp_modules
from runtime.parallel.gradients import gradient_norm
from runtime.parallel.mesh import AXES, build, plan_layout
from runtime.parallel.parallelize import materialize, parallelize
from runtime.parallel.shards import gather_whole
from runtime.parallel.vocabulary import SequenceSplitCrossEntropy, VocabularyParallelCrossEntropy
from runtime.state import model_tensors
from tests.distributed.parity import every_bool, nested
from tests.workers import run_workers

SHAPE = {"num_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2}
EVERYTHING = {"num_layers": 2, "intermediate_size": 48, **nested(every_bool(ModelConfig))}
LAYOUTS = [
    (2, {}),
    (2, {"data_replicate": 2}),
    (4, {"data_replicate": 2}),
    (2, {"tensor": 2}),
    (4, {"tensor": 2}),
    (4, {"data_replicate": 2, "tensor": 2}),
]


def parallel_decoder(world_size, model=None, **options):
    config = ModelConfig(**{**SHAPE, "vocab_size": 64, "init_std": 0.1, **(model or {})})
    parallel = ParallelConfig(**options)
    mesh = build(plan_layout(parallel, world_size, config, 16, 8), "cpu")
    with torch.device("meta"):
        decoder = Decoder(config)
    materialize(parallelize(decoder, mesh, parallel), mesh.device, seed=7)
    return decoder, mesh


def random_tokens(vocab_size=64):
    return torch.randint(vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))


def logits_and_gradient(rank, world_size, options, model):
    """Logits, and the gradient of their mean square with respect to the embedding; of a mesh and of one process."""
    decoder, mesh = parallel_decoder(world_size, model, **options)
    alone = Decoder(decoder.config)
    initialize(alone, seed=7)
    tokens, found = random_tokens(decoder.config.vocab_size), []
    for each in (decoder, alone):
        logits = each(tokens)
        assert not isinstance(logits, DTensor)
        logits.square().mean().backward()
        gradient = each.embedding.weight.grad
        gradient = gradient.full_tensor() / mesh.layout.data if isinstance(gradient, DTensor) else gradient
        found.append((logits.detach(), gradient))
    return found


@pytest.mark.parametrize("model", [{}, {"vocab_size": 61}, {"tie_embeddings": True, "qk_norm": True}], ids=str)
@pytest.mark.parametrize(("world_size", "options"), LAYOUTS)
def test_logits_are_whole_and_differentiable(world_size, options, model):
    for (logits, gradient), (expected, expected_gradient) in run_workers(
        logits_and_gradient, world_size, world_size, options, model
    ):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def evaluate_before_and_after(rank, options):
    """Losses of a forward, of one after doubling every weight's shard, and of one that expects it doubled."""
    losses = []
    for reshard in (True, False):
        decoder, _ = parallel_decoder(2, reshard_after_forward=reshard, **options)
        tokens = random_tokens()
        with torch.no_grad():
            losses.append(decoder(tokens, tokens).cross_entropy.item())
            for parameter in decoder.parameters():
                parameter.mul_(2.0)
            losses.append(decoder(tokens, tokens).cross_entropy.item())
    alone = Decoder(decoder.config)
    initialize(alone, seed=7)
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.mul_(2.0)
        return losses, alone(tokens, tokens).cross_entropy.item()


@pytest.mark.parametrize("options", [{}, {"tensor": 2}])
def test_an_evaluation_sees_weights_that_were_changed_in_place(options):
    (first, second, third, fourth), expected = run_workers(evaluate_before_and_after, 2, options)[0]
    assert first == third != second
    assert second == pytest.approx(expected, rel=1e-5) and fourth == pytest.approx(expected, rel=1e-5)


def save_and_load_elsewhere(rank, location):
    """Whether a tensor-parallel decoder that loads a sharded one's checkpoint has its tensors and its losses."""
    decoder, _ = parallel_decoder(2, EVERYTHING)
    with torch.no_grad():
        for number, block in enumerate(decoder.blocks):
            block.feed_forward.router.bias.copy_(torch.arange(3) * 0.1 + number)
    store, tokens = CheckpointStore(location), random_tokens()
    store.save("tokens-0-segment-0", model_tensors(decoder), {})
    assert store.close()

    other, _ = parallel_decoder(2, EVERYTHING, tensor=2)
    other.to_empty(device="cpu")
    CheckpointStore(location, read_only=True).load("tokens-0-segment-0", model_tensors(other))
    pairs = zip(model_tensors(decoder).items(), model_tensors(other).values(), strict=True)
    differing = [name for (name, one), two in pairs if not torch.equal(gather_whole(one), gather_whole(two))]
    with torch.no_grad():
        return differing, [each(tokens, tokens).total.item() for each in (decoder, other)]


def test_all_parameters_pass_from_one_mesh_to_another_through_a_checkpoint(tmp_path):
    for differing, (loss, other_loss) in run_workers(save_and_load_elsewhere, 2, str(tmp_path / "checkpoints")):
        assert differing == []
        assert other_loss == pytest.approx(loss, rel=1e-5)


def precisions(rank, world_size, options, model):
    decoder, _ = parallel_decoder(world_size, model, precision="bf16", **options)
    seen = {}
    decoder.blocks[1].feed_forward.register_forward_hook(lambda module, args, out: seen.update(activation=out[0].dtype))
    decoder.blocks[1].register_forward_pre_hook(lambda module, args: seen.update(rotary=args[1].dtype))
    tokens = random_tokens()
    losses = decoder(tokens, tokens)
    losses.total.backward()
    seen |= {"loss": losses.cross_entropy.dtype, "fsdp": len(fsdp_modules(decoder))}
    seen["parameters"] = {parameter.dtype for parameter in decoder.parameters()}
    seen["gradients"] = {parameter.grad.dtype for parameter in decoder.parameters()}
    return seen, (losses.cross_entropy / tokens.numel()).item()


@pytest.mark.parametrize("model", [{"tie_embeddings": True}, {"templates": 2}], ids=str)
@pytest.mark.parametrize(("world_size", "options"), [(1, {}), (2, {}), (2, {"tensor": 2})])
def test_bf16_computes_in_bf16_and_keeps_the_rest_in_float32(world_size, options, model):
    alone = run_workers(precisions, 1, 1, {}, model)[0][1]
    for seen, loss in run_workers(precisions, world_size, world_size, options, model):
        assert seen["activation"] == torch.bfloat16
        assert seen["loss"] == seen["rotary"] == torch.float32
        assert seen["parameters"] == seen["gradients"] == {torch.float32}
        assert seen["fsdp"] == 4
        assert loss == pytest.approx(alone, rel=1e-2)


OF_DEPTHS = {"own_norms": True, "own_scales": True, "relaxation": "lora", "rank": 2, "injection": "linear"}
LOOPED = {
    "num_layers": 10,
    "init": "normal",
    "norm_scaling": "depth",
    "tying": {"plan": "cycle", "loops": 5, "backprop_loops": 3, **OF_DEPTHS},
}
"""Loops without gradients have a graph of their own."""


def step_of_each_mode(rank, world_size, options, model, modes, backend="inductor"):
    """Loss and gradient norm by (recompute, compile), and the number of graphs that torch compiled."""
    with patch("torch.compile", partial(torch.compile, backend=backend)):
        return _step_of_each_mode(world_size, options, model, modes)


def _step_of_each_mode(world_size, options, model, modes):
    found = []
    tokens = random_tokens()
    for recompute, compile in modes:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        decoder, _ = parallel_decoder(world_size, model, recompute=recompute, compile=compile, **options)
        losses = decoder(tokens, tokens)
        losses.total.backward()
        norm = gradient_norm(decoder.parameters())
        found.append((losses.cross_entropy.item(), norm.item(), torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    return found


@pytest.mark.parametrize(
    ("world_size", "options", "model", "modes"),
    [
        (1, {}, {}, [("none", True)]),
        *(
            pytest.param(2, options, model, [(mode, True) for mode in modes], marks=pytest.mark.slow)
            for options, modes in [({}, ("none", "selective", "full")), ({"tensor": 2}, ("none", "full"))]
            for model in ({}, {"templates": 2})
        ),
        *(
            pytest.param(2, options, model, [("full", True)], marks=pytest.mark.slow)
            for options in ({}, {"tensor": 2})
            for model in ({"experts": {"count": 3}, "streams": {"count": 2}}, LOOPED)
        ),
    ],
)
def test_equal_blocks_share_one_graph_that_computes_the_same(world_size, options, model, modes):
    modes = [("none", False), *modes]
    (plain, *compiled) = run_workers(step_of_each_mode, world_size, world_size, options, model, modes)[0]
    assert plain[2] == 0
    for loss, norm, graphs in compiled:
        assert graphs == (2 if model == LOOPED else 1)
        assert (loss, norm) == pytest.approx(plain[:2], rel=1e-5)


def test_all_depths_share_one_graph():
    """And those without gradients another; dynamo gives up after eight."""
    modes = [("none", False), ("none", True)]
    plain, compiled = run_workers(step_of_each_mode, 1, 1, {}, LOOPED, modes, "eager")[0]
    assert compiled[2] == 2
    assert compiled[:2] == pytest.approx(plain[:2], rel=1e-5)


def bytes_kept(rank):
    """By mode, bytes of activations that are still there after a forward."""
    kept = {}
    for mode in ("none", "selective", "full"):
        decoder, _ = parallel_decoder(1, recompute=mode)
        tokens = random_tokens()
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            losses = decoder(tokens, tokens)
        kept[mode] = sum(event.self_cpu_memory_usage for event in profile.key_averages())
        del losses
    return kept


def test_recomputation_keeps_less():
    kept = run_workers(bytes_kept, 1)[0]
    assert kept["selective"] < 0.85 * kept["none"]
    assert kept["full"] < 0.4 * kept["selective"]


def losses_of(rank, sizes, kind, rows, chunk_elements, passes):
    """Sums and gradients of a cross-entropy split over the ranks, and of the plain one."""
    positions, hidden_size, vocab_size = sizes
    mesh = build(plan_layout(ParallelConfig(tensor=2), 2, ModelConfig(**SHAPE, vocab_size=64), 16, 8), "cpu")
    mesh = mesh.device_mesh[AXES[2]]
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, hidden_size, generator=generator) for n in (positions, vocab_size))
    targets = torch.randint(vocab_size, (positions,), generator=generator)
    targets[:rows] = IGNORE
    placement = Shard(0) if kind is VocabularyParallelCrossEntropy else Replicate()
    split_hidden = distribute_tensor(hidden.clone(), mesh, [Shard(0)]).requires_grad_()
    split_weight = distribute_tensor(weight.clone(), mesh, [placement]).requires_grad_()
    split = kind(chunk_elements)
    split.passes = passes
    found = split(split_hidden.redistribute(placements=[Replicate()]), split_weight, targets, 1e-2)
    hidden.requires_grad_(), weight.requires_grad_()
    expected = LinearCrossEntropy()(hidden, weight, targets, 1e-2)
    (3 * found.total).backward()
    (3 * expected.total).backward()
    return (
        [*(each.detach() for each in found[:2]), split_hidden.grad.full_tensor(), split_weight.grad.full_tensor()],
        [*(each.detach() for each in expected[:2]), hidden.grad, weight.grad],
    )


@pytest.mark.parametrize(
    ("chunk_elements", "passes"), [(None, EAGER), (40, EAGER), (40, FUSIBLE)], ids=["whole", "chunks", "fusible"]
)
@pytest.mark.parametrize("ignored", [0, 3, 12])
@pytest.mark.parametrize("kind", [SequenceSplitCrossEntropy, VocabularyParallelCrossEntropy])
def test_a_split_cross_entropy_is_the_whole_one(kind, ignored, chunk_elements, passes):
    for found, expected in run_workers(losses_of, 2, (12, 8, 20), kind, ignored, chunk_elements, passes):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)
