"""What a step cannot do without, and to which term an operation counts."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.bench import SHAPES, batches
from benchmarks.floor import CALLERS, LARGEST_COPY, SUMS, Floor, bandwidth, built, events, floors, table, term_of
from runtime.model.counts import count, flops_per_token
from runtime.observe.memory import fake_world

SMALL, TINY = SHAPES["small"], SHAPES["tiny"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_floors_add_up_to_the_steps_flops_with_half_of_the_attention(shape):
    once = replace(shape, recompute=False)
    found, tokens = floors(once, 4), shape.batch * shape.seq_len
    attention = 2 * found["attention"].flops
    others = sum(each.flops for term, each in found.items() if term != "attention")
    assert attention + others == flops_per_token(shape.config(), shape.seq_len) * tokens


def test_recomputation_adds_a_forward_of_the_blocks():
    once, again = floors(SMALL, 4), floors(replace(SMALL, recompute=True), 4)
    for term in ("products of blocks", "attention"):
        assert again[term].flops == pytest.approx(4 / 3 * once[term].flops)
    forward = {"norms": 2 / 5, "rotary": 1 / 2, "gate": 3 / 8, SUMS: 6 / 19}
    for term, share in forward.items():
        blocks = once[term].bytes - (5 * 4 * SMALL.batch * SMALL.seq_len * SMALL.hidden_size if term == "norms" else 0)
        assert again[term].bytes - once[term].bytes == pytest.approx(share * blocks), term
    assert again["loss"] == once["loss"] and again["optimizer"] == once["optimizer"]


def test_the_optimizer_moves_seven_numbers_a_parameter():
    assert floors(SMALL, 2)["optimizer"] == Floor(bytes=28 * count(SMALL.config()).total)


def called(*names: str) -> SimpleNamespace:
    """An operation by its callers, the outermost first."""
    event = None
    for name in names:
        event = SimpleNamespace(name=name, cpu_parent=event)
    return event


@pytest.mark.parametrize(
    ("callers", "term"),
    [
        (["aten::linear", "aten::mm"], "products of blocks"),
        (["_LinearCrossEntropy", "meristem::product", "mkldnn::_linear_pointwise"], "loss"),
        (["_LinearCrossEntropyBackward", "aten::mul"], "loss"),
        (["_LinearCrossEntropy", "Torch-Compiled Region: 0/0", "triton_red_fused_exp_sum_0"], "loss"),
        (["_RMSNorm", "aten::mul"], "norms"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu", "aten::empty"], "attention"),
        (["CompiledFunction", "aten::mm"], "products of blocks"),
        (["CompiledFunction", "graph_0_cpp_fused_silu_mul"], "gate"),
        (["CompiledFunction", "graph_0_cpp_fused_add"], "compiled, fused"),
        (["aten::_foreach_norm", "aten::linalg_vector_norm"], "norm of the gradient, clipping"),
        (["_RMSNorm", "aten::linalg_vector_norm"], "norms"),
        (["aten::_foreach_mul_", "aten::mul_"], "norm of the gradient, clipping"),
        (["aten::_foreach_add_", "aten::add_"], "optimizer"),
        (["aten::mul"], "gate"),
        (["MulBackward0", "aten::mul"], "gate"),
        (["autograd::engine::evaluate_function: _RMSNormBackward", "aten::add_"], SUMS),
        (["autograd::engine::evaluate_function: MmBackward0", "MmBackward0", "aten::mul"], "gate"),
        (["FSDP::all_gather", "aten::copy_"], "gathers and casts of FSDP"),
        (["aten::add"], SUMS),
        (["aten::sum"], "other operations"),
    ],
)
def test_an_operation_counts_to_the_first_caller_that_tells(callers, term):
    assert term_of(called(*callers)) == term


@pytest.mark.parametrize("recompute", [False, True])
def test_every_term_has_the_operations_of_a_step(recompute):
    """All of their name. Blocks that are computed again do so from within the backward."""
    shape = replace(TINY, recompute=recompute)
    with fake_world(1):
        step, source = built(shape, CPU), batches(shape, CPU)
        step(*next(source))
        found = Counter((term_of(event), event.name) for event in events(step, next(source), CPU)[0])
    layers, tensors, again = shape.num_layers, 9 * shape.num_layers + 3, recompute * shape.num_layers
    expected = {
        ("norms", "aten::linalg_vector_norm"): 2 * (layers + again) + 1,
        ("norm of the gradient, clipping", "aten::linalg_vector_norm"): tensors,
        ("norm of the gradient, clipping", "aten::_foreach_mul_"): 1,
        ("gate", "aten::silu"): layers + again,
        ("gate", "aten::silu_backward"): layers,
        ("gate", "MulBackward0"): layers,
        (SUMS, "aten::add_"): 3 * layers + 1,  # one is the step's loss
        ("rotary", "_Rotate"): 2 * (layers + again),
        ("attention", "aten::scaled_dot_product_attention"): layers + again,
        ("loss", "_LinearCrossEntropy"): 1,
        ("embedding", "aten::embedding"): 1,
        ("optimizer", "aten::_fused_adamw_"): 2,
    }
    assert {key: found[key] for key in expected} == expected
    elsewhere = {name for term, name in found if term in ("other operations", "compiled, fused")}
    assert not elsewhere & {"aten::mul", "aten::mul_", "aten::add", "aten::add_", "aten::linalg_vector_norm"}


def test_the_bandwidth_of_many_bytes_takes_a_copy_of_fewer(monkeypatch):
    copied = []
    monkeypatch.setattr("benchmarks.floor.LARGEST_COPY", LARGEST_COPY // 1000)
    monkeypatch.setattr("benchmarks.floor.alone", lambda action: copied.append(action()) or 1.0)
    bandwidth(CPU, 32 * 10**9)
    assert {each.nbytes for each in copied if each is not None} == {LARGEST_COPY // 1000}


def test_the_table_begins_with_the_largest_gap_and_ends_with_what_is_left():
    terms = {"attention": 0.5, "products of blocks": 0.2, "something": 0.1}
    found = {
        "element": 4,
        "rate": 1e12,
        "bandwidth": {"stream": 1e10, "parameters": 1e10},
        "terms": terms,
        "seconds": 1,
    }
    rows = table(SMALL, found)
    assert rows[0][0] == "attention" and rows[-2][0] == "something"
    assert rows[-1] == ("between operations", pytest.approx(200.0), None)
    assert {term for term, _, floor in rows if floor is not None} <= {*CALLERS, SUMS, "attention", "products of blocks"}
