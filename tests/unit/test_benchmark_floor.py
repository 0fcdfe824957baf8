"""What a step cannot do without, and to which term an operation counts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.bench import SHAPES
from benchmarks.floor import CALLERS, Floor, floors, table, term_of
from runtime.model.counts import count, flops_per_token

SMALL = SHAPES["small"]


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
    forward = {"norms": 2 / 5, "rotary": 1 / 2, "gate": 3 / 8}
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
        (["_RMSNorm", "aten::mul"], "norms"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu", "aten::empty"], "attention"),
        (["CompiledFunction", "aten::mm"], "products of blocks"),
        (["CompiledFunction", "graph_0_cpp_fused_silu_mul"], "gate"),
        (["CompiledFunction", "graph_0_cpp_fused_add"], "compiled, fused"),
        (["aten::add_"], "other operations"),
    ],
)
def test_an_operation_counts_to_the_first_caller_that_tells(callers, term):
    assert term_of(called(*callers)) == term


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
    assert {term for term, _, floor in rows if floor is not None} <= {*CALLERS, "attention", "products of blocks"}
