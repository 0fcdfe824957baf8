"""What a growth does to the part of a run's state that is no tensor, and what is written down of it."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

from growth.context import stand_in
from growth.dimensions import parameter_shapes
from growth.operator import find, preview, resolved_options
from growth.plan import Plan, Step, make_plan
from growth.policies import Moments, policy_of
from growth.rates import grown_rates
from growth.regions import grown_regions
from runtime.model.config import ModelConfig
from runtime.model.counts import count, flops_per_token
from runtime.state import TrainState


def describe(
    plan: Plan, steps: Sequence[Step], *, moments: Any, rates: str, schedule: Mapping[str, Any], seq_len: int
) -> dict[str, Any]:
    """The record of a growth, as events and lineage keep it: what was decided, and what it makes of the model.

    moments, rates, schedule: the policies as they were given; seq_len: the length of the sequences before.
    """
    return {
        "operators": decided(steps),
        "moments": moments,
        "rates": rates,
        "schedule": dict(schedule),
        "preserves": plan.preserves,
        "seed": plan.seed,
        "label": plan.label,
        **({"ancestors": list(plan.ancestors)} if plan.ancestors else {}),
        "before": shape(plan.source, seq_len),
        "after": shape(plan.target, plan.seq_len or seq_len),
    }


def decided(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The operators of a growth with all their options, as a record has them."""
    return [{"operator": name, "options": resolved_options(name, options)} for name, options in steps]


def shape(model: ModelConfig, seq_len: int) -> dict[str, Any]:
    """A model's configuration and sizes, as a record has them."""
    return {
        "model": model.model_dump(mode="json"),
        "counts": asdict(count(model)),
        "seq_len": seq_len,
        "flops_per_token": flops_per_token(model, seq_len),
    }


def grown_state(
    state: TrainState, plan: Plan, record: Mapping[str, Any], parent: Mapping[str, Any], counted: Callable[[str], float]
) -> TrainState:
    """The state after a growth: the clock and the position as they were, the ledger with what other ancestors have
    cost, a new segment without measurements, and the births, regions and rates that follow from the plan.

    record: as of `describe`; parent: where the state before is kept, for the lineage; counted: a grown parameter's
    optimizer count. ValueError where rates cannot follow.
    """
    schedule = record["schedule"]
    rewarms_new = schedule["kind"] == "rewarm" and schedule["scope"] == "new"
    rewarm = {key: schedule[key] for key in ("start", "peak", "tokens")} if rewarms_new else None
    births = [*state.births, {"tokens": state.clock.tokens, "rewarm": rewarm}]
    regions = grown_regions(plan, state.regions, len(state.births), rewarms_new=rewarms_new, count=counted)
    ancestor = {
        **parent,
        "carry": "growth",
        "seed": plan.seed,
        "tokens": state.clock.tokens,
        "flops": state.flops,
        **{key: record[key] for key in ("operators", "moments", "rates", "schedule", "label")},
        **{key: record[key] for key in ("ancestors",) if key in record},
    }
    return replace(
        deepcopy(state),
        segment=state.segment + 1,
        segment_start=state.clock.tokens,
        births=births,
        regions=regions,
        flops=state.flops + sum(each["flops"] for each in plan.ancestors),
        rates=grown_rates(plan, state.rates, follow=record["rates"] == "follow"),
        lineage=[*state.lineage, ancestor],
        run_of_skips=[],
        noise=TrainState().noise,
    )


def foresee(
    model: ModelConfig, steps: Sequence[Step], moments: Moments | Mapping[str, Moments], *, follow: bool
) -> tuple[ModelConfig, int | None]:
    """The model that the steps lead to, and the length of the sequences where they change it, from the configuration
    alone. ValueError as of `make_plan` and `grown_rates`, but for what depends on the weights."""
    grown, seq_len = model, None
    for name, options in steps:
        found = preview(name, options, grown)
        grown, seq_len = found.model, found.seq_len or seq_len
    for name in parameter_shapes(grown):
        policy_of(name, moments)
    if follow and all(find(name).shape is None for name, _ in steps):
        grown_rates(
            make_plan(model, steps, moments=moments, seed=0, label="", context=stand_in(model)), {}, follow=True
        )
    return grown, seq_len
