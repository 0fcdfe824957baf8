"""The depth plan: which unique block runs at each unrolled depth."""

from runtime.model.config import ModelConfig


def depth_plan(config: ModelConfig) -> tuple[int, ...]:
    """Index of the unique block at each unrolled depth. Untied, depth and block are the same."""
    return tuple(range(config.num_layers))
