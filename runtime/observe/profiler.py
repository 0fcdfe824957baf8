"""A trace of a few steps, and of CUDA's allocations, where the configuration asks for one."""

import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Profiler:
    """Traces steps `first` to `last`, both included, of the rank that has a `folder`.

    Writes ``steps-<first>-<last>.json.gz``, for chrome://tracing or Perfetto, and, with
    `memory_snapshot`, ``memory-<first>-<last>.pickle`` for https://pytorch.org/memory_viz.
    """

    def __init__(self, folder: Path | None, steps: tuple[int, int] | None, *, memory_snapshot: bool = False):
        self._folder = folder
        self._first, self._last = steps if steps and folder else (0, -1)
        self._snapshot = memory_snapshot
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Step `step`, counted from 1, is about to begin."""
        if self._profile is not None or not self._first <= step <= self._last:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._started_at = step
        self._profile = profile(activities=activities, profile_memory=True, record_shapes=True)
        if self._snapshot and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        elif self._snapshot:
            warnings.warn("observe.memory_snapshot records CUDA allocations; there is no GPU here", stacklevel=2)
        self._profile.start()

    def after(self, step: int) -> None:
        """Step `step` has been issued."""
        if step >= self._last:
            self.close(step)

    def close(self, step: int | None = None) -> None:
        """Write what has been recorded, also of a run that ends within the steps."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        recorded.stop()
        span = f"{self._started_at}-{self._last if step is None else step}"
        self._folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._folder / f"steps-{span}.json.gz"))
        if self._snapshot and torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-{span}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
