"""Growing streams: what goes on as it was, what is drawn, and what a frozen backbone does to the optimizer's state."""

import pytest
import torch

from growth.maps import Fresh
from growth.operator import find
from growth.plan import Target, transfer
from growth.policies import Moments
from runtime.model.decoder import Decoder
from runtime.model.initialization import initialize
from runtime.model.parametrization import Role, initial_std, role
from tests.growing import (
    Tensors,
    config,
    difference,
    evaluate,
    grown,
    plan_of,
    random_decoder,
    random_tokens,
    weights,
)

TWO = {"count": 2, "prefix_tokens": 3, "smoothing": 0.1}
VARIANTS = {
    "one": {},
    "grouped": {"num_kv_heads": 2, "tie_embeddings": True},
    "looped": {"tying": {"plan": "cycle", "loops": 2}},
    "two": {"streams": TWO},
    "two quiet": {"streams": TWO | {"quiet": True}},
    "two shared": {"streams": TWO | {"prefix": "block"}, "num_layers": 4, "tying": {"plan": "cycle", "loops": 2}},
}
STATES = {"step": "counter", "exp_avg": "gradient", "exp_avg_sq": "square"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_there_goes_on_and_the_rest_is_drawn_like_a_new_models(variant):
    decoder = random_decoder(config(**VARIANTS[variant]))
    old = weights(decoder)
    plan = plan_of(decoder, ("streams.add", {"count": 4}))
    assert not plan.preserves and plan.target.streams.count == 4 and plan.target.num_layers == decoder.config.num_layers
    new = weights(grown(plan, decoder))
    for name, each in new.items():
        if name in old and old[name].shape == each.shape:
            assert torch.equal(each, old[name])
        elif role(name) is Role.PREFIX:
            kept, fresh = each.tensor_split([old[name].shape[0] if name in old else 0])
            assert name not in old or torch.equal(kept, old[name])
            assert fresh.std() == pytest.approx(initial_std(Role.PREFIX, plan.target), rel=0.3)
        elif role(name) is Role.PREFIX_BIAS:
            assert each.item() == -10.0
        elif decoder.config.streams.count == 1:
            std = initial_std(role(name), plan.target)
            assert (each == 0).all() if std is None else each.std() == pytest.approx(std, rel=0.3)


def test_old_streams_keep_their_proportions_and_a_new_one_has_their_mean():
    decoder = random_decoder(config(streams=TWO | {"smoothing": 0.0}))
    four = grown(plan_of(decoder, ("streams.add", {"count": 4})), decoder)
    x = torch.randn(4, 3, 5, 16, dtype=torch.float64)
    before, after = decoder.aggregation.weights(x[:2]), four.aggregation.weights(x)
    assert torch.allclose(after[..., 0] / after[..., 1], before[..., 0] / before[..., 1])
    mean = (after[..., 0] * after[..., 1]).sqrt()
    assert torch.allclose(after[..., 2], mean) and torch.allclose(after[..., 3], mean)


FOUR = {"count": 4, "prefix_tokens": 3, "smoothing": 0.0}
LARGER = {
    "plain": {"streams": FOUR},
    "grouped, quiet": {"num_kv_heads": 2, "streams": FOUR | {"quiet": True}},
    "shared": {"streams": FOUR | {"prefix": "block"}, "tying": {"plan": "cycle", "loops": 2}},
}


@pytest.mark.parametrize("variant", LARGER)
def test_fewer_streams_are_the_model_whose_others_are_never_heard(variant):
    decoder, tokens = random_decoder(config(**LARGER[variant])), random_tokens()
    plan = plan_of(decoder, ("streams.keep", {"count": 2}))
    two = grown(plan, decoder)
    assert not plan.preserves and two.config.streams == decoder.config.streams.model_copy(update={"count": 2})
    assert difference(decoder, two, tokens) > 1e-3
    with torch.no_grad():
        decoder.aggregation.aggregation_in.weight.unflatten(1, (-1, 4))[:, :, 2:] = 0
        decoder.aggregation.aggregation_out.bias[2:] = -1e4
    assert difference(decoder, two, tokens) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_streams_undo_more(variant):
    decoder = random_decoder(config(**VARIANTS[variant]))
    before = decoder.config.streams.count
    plan = plan_of(decoder, ("streams.add", {"count": 5, "backbone": "frozen"}), ("streams.keep", {"count": before}))
    old, new = weights(decoder), weights(grown(plan, decoder))
    assert old.keys() == new.keys() and all(torch.equal(new[name], old[name]) for name in old)
    frozen = {"backbone": "frozen"} if before > 1 else {}
    assert plan.target.streams == decoder.config.streams.model_copy(update=frozen)


def test_a_quiet_start_from_one_stream_is_nearly_the_model_and_a_loud_one_is_not():
    decoder, tokens = Decoder(config(init_std=0.1)).double(), random_tokens()
    initialize(decoder, 0)
    found = {}
    for quiet in (True, False):
        plan = plan_of(decoder, ("streams.add", {"count": 3, "prefix_tokens": 8, "quiet": quiet}))
        found[quiet] = difference(decoder, grown(plan, decoder), tokens)
    assert 1e-12 < found[True] < 5e-3 < 0.05 < found[False]


def test_freezing_and_thawing_leave_the_logits_as_they_were():
    decoder = random_decoder(config(streams=TWO))
    for steps in ([("frozen",)], [("frozen",), ("trained",)]):
        plan = plan_of(decoder, *[("streams.backbone", {"to": to}) for (to,) in steps])
        assert plan.preserves and plan.target.streams.backbone == steps[-1][0]
        assert difference(decoder, grown(plan, decoder), random_tokens()) == 0


def state_after(plan, state):
    """Of every trained parameter of the target, from that of the source's trained ones."""
    source, found = Tensors(state), {}
    for name, each in plan.maps.items():
        for kind in STATES:
            out = torch.full((() if kind == "step" else each.shape), torch.nan, dtype=torch.float64)
            indices = [torch.arange(size) for size in out.shape]
            transfer(plan, [Target(f"optimizer.{name}.{kind}", out, indices)], source, STATES)
            found[name, kind] = out
    return found


def test_old_parts_keep_their_optimizer_state_and_new_ones_begin_at_zero():
    decoder = random_decoder(config(streams=TWO))
    plan = plan_of(decoder, ("streams.add", {"count": 4}))
    assert set(plan.moments.values()) == {Moments.RESET_NEW}
    ones = {
        f"optimizer.{name}.{kind}": torch.ones_like(each) for name, each in weights(decoder).items() for kind in STATES
    }
    ones = {name: torch.tensor(7.0) if name.endswith("step") else each for name, each in ones.items()}
    found = state_after(plan, ones)
    assert bool((found["blocks.0.attention.q_proj.weight", "exp_avg"] == 1).all())
    expected = {
        "depths.1.prefix.prefix_keys": torch.tensor([1.0] * 6 + [0.0] * 6).double().unsqueeze(1).expand(-1, 24),
        "aggregation.aggregation_in.weight": torch.tensor([1.0, 1, 0, 0]).double().repeat(16).expand(16, -1),
        "aggregation.aggregation_out.weight": torch.tensor([1.0, 1, 0, 0]).double().unsqueeze(1).expand(-1, 16),
        "aggregation.aggregation_out.bias": torch.tensor([1.0, 1, 0, 0]).double(),
    }
    for name, wanted in expected.items():
        assert torch.equal(found[name, "exp_avg_sq"], wanted), name
        assert found[name, "step"] == 7


def test_the_streams_that_stay_keep_their_optimizer_state():
    decoder = random_decoder(config(streams=FOUR | {"quiet": True}))
    plan = plan_of(decoder, ("streams.keep", {"count": 2}))
    assert set(plan.moments.values()) == {Moments.KEEP}
    state = {f"optimizer.{name}.{kind}": each for name, each in weights(decoder).items() for kind in STATES}
    found = state_after(plan, {name: torch.tensor(7.0) if "step" in name else each for name, each in state.items()})
    for name, each in weights(grown(plan, decoder)).items():
        assert torch.equal(found[name, "exp_avg"], each) and found[name, "step"] == 7, name


def test_a_thawed_backbone_begins_with_empty_optimizer_state():
    decoder = random_decoder(config(streams=TWO | {"backbone": "frozen"}))
    plan = plan_of(decoder, ("streams.backbone", {"to": "trained"}))
    state = {}
    for name, each in decoder.named_parameters():
        for kind in STATES if each.requires_grad else ():
            state[f"optimizer.{name}.{kind}"] = torch.tensor(7.0) if kind == "step" else torch.ones_like(each)
    found = state_after(plan, state)
    for name, each in decoder.named_parameters():
        assert bool((found[name, "exp_avg"] == (1 if each.requires_grad else 0)).all())
        assert found[name, "step"] == (7 if each.requires_grad else 0)


@pytest.mark.parametrize(
    ("steps", "preserves"),
    [
        ([("width.hidden", {"factor": 2})], True),
        ([("width.heads", {"factor": 2})], True),
        ([("width.head_dim", {"factor": 2})], True),
        ([("width.intermediate", {"factor": 2})], True),
        ([("depth.insert_identity", {})], True),
        ([("depth.stack", {})], False),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", [{}, {"num_kv_heads": 2, "qk_norm": True, "streams": TWO | {"quiet": True}}], ids=str)
def test_other_operators_carry_the_streams(steps, preserves, model):
    decoder = random_decoder(config(**{"streams": TWO} | model))
    plan = plan_of(decoder, *steps)
    assert plan.preserves is preserves
    found = difference(decoder, grown(plan, decoder), random_tokens())
    assert found < 1e-12 if preserves else found > 1e-3


def test_two_steps_in_one_growth_draw_different_prefixes():
    decoder = random_decoder(config())
    plan = plan_of(decoder, ("streams.add", {"count": 2, "prefix_tokens": 3}), ("streams.add", {"count": 4}))
    rows = evaluate(plan.maps, weights(decoder))["depths.0.prefix.prefix_keys"].unflatten(0, (4, 3))
    assert not torch.equal(rows[0], rows[2]) and not torch.equal(rows[2], rows[3])
    drawn = {
        term.source.name for term in plan.maps["depths.0.prefix.prefix_keys"].terms if isinstance(term.source, Fresh)
    }
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("model", "name", "options", "message"),
    [
        ({"streams": TWO}, "streams.add", {"count": 2}, "count 2 is not more than the model's 2 streams"),
        ({"streams": TWO}, "streams.add", {"count": 3, "prefix_tokens": 5}, "prefix_tokens 5 is not that.*accepted: 3"),
        ({"streams": TWO}, "streams.add", {"count": 3, "quiet": True}, "quiet True is not that.*accepted: False"),
        ({"streams": TWO}, "streams.keep", {"count": 2}, "count 2 is not less than the model's 2 streams"),
        ({}, "streams.keep", {"count": 1}, "count 1 is not less than the model's 1 streams"),
        ({}, "streams.backbone", {"to": "frozen"}, "one stream"),
        ({"streams": TWO}, "streams.backbone", {"to": "trained"}, "is trained already"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(model, name, options, message):
    decoder = random_decoder(config(**model))
    with pytest.raises(ValueError, match=message):
        find(name)(decoder.config, **options)
    with pytest.raises(ValueError, match=f"operator {name}: "):
        plan_of(decoder, (name, options))
