"""What a segment reads, opened and checked before a process has built or written anything."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from runtime.config import Config
from runtime.data.evaluation_set import EvaluationSet
from runtime.data.mixture import MixtureHistory
from runtime.data.tokenizer import load as load_tokenizer
from runtime.data.tokens import TokenFile
from runtime.observe.metrics import check_available
from runtime.parallel import float8
from runtime.parallel.mesh import Layout, plan_layout


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked, before a process has built or written anything."""

    layout: Layout
    sources: list[tuple[TokenFile, float]]
    held_out: dict[str, EvaluationSet]
    tokenizer: str | None


def open_inputs(config: Config, world_size: int) -> Inputs:
    """ValueError naming the first key or file that cannot be used."""
    check_available(config.observe)
    float8.check_available(config.parallel)
    data, vocab_size = config.data, config.model.vocab_size
    layout = plan_layout(config.parallel, world_size, config.model, data.seq_len, *config.batches.sizes)
    _refuse_one_piece(config, layout)
    sources = [(TokenFile(each.path), each.weight) for each in data.sources]
    for source, _ in sources:
        source.check_vocabulary(vocab_size)
    held_out = open_held_out(config)
    MixtureHistory(sources, config.run.seed, data.seq_len)
    return Inputs(layout, sources, held_out, read_tokenizer(config))


def _refuse_one_piece(config: Config, layout: Layout) -> None:
    """ValueError for a batch that is to follow the noise of its pieces, and is one."""
    batch = config.batch
    one = layout.data == 1 and (batch.micro_sequences or batch.sequences) >= batch.sequences
    if one and batch.kind in ("noise_scale", "norm_test"):
        raise ValueError(
            f'batch.kind = "{batch.kind}" measures a batch by its pieces, and on one data-parallel rank it is one; set '
            f"batch.micro_sequences below batch.sequences = {batch.sequences}"
        )


def open_held_out(config: Config) -> dict[str, EvaluationSet]:
    """The evaluation sets by name. ValueError naming the first file that cannot be used."""
    return {
        each.name: EvaluationSet(
            each.path,
            config.data.seq_len,
            config.model.vocab_size,
            max_sequences=config.evaluation.max_sequences,
            document_mask=config.data.document_mask,
        )
        for each in config.evaluation.sets
    }


def read_tokenizer(config: Config) -> str | None:
    """Text of the tokenizer.json that the configuration names, or that lies beside the first source."""
    named = config.data.tokenizer
    path = Path(named) if named else Path(config.data.sources[0].path).parent / "tokenizer.json"
    if named is None and not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.tokenizer: cannot read {path}: {error}") from None
    load_tokenizer(path)
    return text


def open_history(inputs: Inputs, config: Config, saved: dict[str, Any], position: int) -> tuple[MixtureHistory, bool]:
    """The run's mixture over time, and whether it changes here.

    `saved` is the history of a loaded checkpoint, empty for a new run. Files may have moved: they are known by their
    fingerprints. ValueError if the sources differ from those in force and `data.on_change` does not allow it.
    """
    if not saved:
        return MixtureHistory(inputs.sources, config.run.seed, config.data.seq_len), False
    if (saved["seq_len"], saved["seed"]) != (config.data.seq_len, config.run.seed):
        raise ValueError(
            f"data.seq_len = {config.data.seq_len} and run.seed = {config.run.seed}, but the order of samples to go on "
            f'with has {saved["seq_len"]} and {saved["seed"]}; keep them, or set start.carry = "weights"'
        )
    at_hand = {source.fingerprint: source for source, _ in inputs.sources}
    was = {each["path"]: each["fingerprint"] for stage in saved["stages"] for each in stage["sources"]}
    history = MixtureHistory.from_json(saved, lambda path: at_hand.get(was[path]))
    renewed = MixtureHistory(inputs.sources, config.run.seed, config.data.seq_len).to_json()["stages"][0]["sources"]
    in_force = saved["stages"][-1]["sources"]
    if _mixture(renewed) == _mixture(in_force):
        return history, False
    if config.data.on_change == "refuse":
        raise ValueError(
            f"data.sources are {_told(renewed)}, but the run was trained on {_told(in_force)}; put them back, or set "
            'data.on_change = "switch" to change the mixture from here on'
        )
    history.change(position, inputs.sources)
    return history, True


def resliced(inputs: Inputs, config: Config, saved: dict[str, Any], position: int) -> MixtureHistory:
    """A new order of sequences of another length, after sample `position` of the saved one. Each source goes on at the
    share of it that was seen; its windows are cut anew, so that some of its text may be seen once more than the rest.
    """
    before, length = saved["seq_len"], config.data.seq_len
    at_hand = {source.fingerprint: source for source, _ in inputs.sources}
    was = {each["path"]: each["fingerprint"] for stage in saved["stages"] for each in stage["sources"]}
    cursors = MixtureHistory.from_json(saved, lambda path: at_hand.get(was[path])).cursors(position)
    drawn = {fingerprint: -(-samples * before // length) for fingerprint, samples in cursors.items()}
    return MixtureHistory(inputs.sources, config.run.seed, length, drawn)


def _mixture(sources: list[dict[str, Any]]) -> list[tuple[str, Fraction]]:
    """What decides the order of samples: neither the listing's order nor the weights' scale does."""
    total = sum(Fraction(each["weight"]) for each in sources)
    return sorted((each["fingerprint"], Fraction(each["weight"]) / total) for each in sources)


def _told(sources: list[dict[str, Any]]) -> str:
    return ", ".join(f"{each['path']} x {each['weight']} ({each['fingerprint'][:8]})" for each in sources)
