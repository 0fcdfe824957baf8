"""A ladder's runs on this machine: so many at a time, each resumed where it stands, hopeless ones stopped."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType

from launch.branch import PRETRAIN, launcher
from launch.closing import last_evaluations, unigram_losses
from launch.ladder import StopConfig
from launch.ladder_runs import Run
from launch.sweep_stopping import ROWS, Rules, judge
from launch.sweep_store import (
    ENDED,
    Ending,
    branch_point,
    ending,
    last_words,
    locked,
    outcome,
    own,
    spent,
    state,
    tail,
    write_config,
    write_ending,
)
from runtime.observe.jsonl import read_rows
from runtime.resilience.exits import BAD_INPUT, FINISHED, INTERRUPTED

POLL_SECONDS, JUDGE_SECONDS, TELL_SECONDS = 0.2, 2.0, 60.0
FAILED = 1


@dataclass
class Launch:
    """A run whose process is at work."""

    run: Run
    slot: int
    process: subprocess.Popen
    started: float
    events: int
    """That the run had before."""
    flops: float
    """That it had spent before."""
    judged: Ending | None = None
    """Why it was told to stop."""


@dataclass
class Queue:
    """Runs, and the processes at work on them."""

    runs: Sequence[Run]
    stop: StopConfig
    jobs: int = 1
    processes: int | None = None
    """Of each run, under torchrun; by default it is one, without."""
    script: str = field(default_factory=lambda: str(PRETRAIN))
    """What trains a run by its configuration."""
    running: list[Launch] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    stopping: bool = False
    refused: str | None = None
    """What a launch said of its configuration."""
    pace: tuple[float, float] = (0.0, 0.0)
    """Seconds and FLOPs of launches that have ended."""

    @cached_property
    def by_name(self) -> dict[str, Run]:
        return {run.name: run for run in self.runs}

    def run(self) -> int:
        """Run what is not finished; 0, 1 where some failed, 2 for bad input of a run and 75 if interrupted."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.signal(each, self._on_signal) for each in numbers]
        try:
            with locked(self.runs):
                self._work()
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
        if self.refused is not None:
            raise ValueError(self.refused)
        if self.stopping:
            print("interrupted; the same command goes on", flush=True)
            return INTERRUPTED
        failed = [run for run in self.runs if (found := ending(run)) and found.state == "failed"]
        for run in failed:
            print(f"failed  {run.name}: {ending(run).reason}", flush=True)
        return FAILED if failed else FINISHED

    def halt(self) -> None:
        """Have every run save and end. They stand in sessions of their own, so a terminal's signal reaches us alone."""
        self.stopping = True
        for launch in self.running:
            launch.process.send_signal(signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.halt()

    def _work(self) -> None:
        told = judged = time.monotonic()
        while True:
            while len(self.running) < self.jobs and not self.stopping and (ready := self._next()) is not None:
                self._start(ready)
            if not self.running:
                return
            time.sleep(POLL_SECONDS)
            for launch in [each for each in self.running if each.process.poll() is not None]:
                self.running.remove(launch)
                self._close(launch)
            now = time.monotonic()
            if now - judged >= JUDGE_SECONDS:
                judged = now
                self._judge()
            if now - told >= TELL_SECONDS:
                told = now
                self._tell("at work: " + ", ".join(launch.run.name for launch in self.running))

    def _next(self) -> Run | None:
        """The first run, in order, that can be launched now."""
        busy = {launch.run.name for launch in self.running}
        for run in self.runs:
            if run.name in self.ended or run.name in busy:
                continue
            parent = self.by_name.get(run.parent)
            found = state(run, parent)
            if found in ENDED:
                self.ended.add(run.name)
            elif found == "begun" or parent is None or branch_point(run, parent) is not None:
                return run
        return None

    def _start(self, run: Run) -> None:
        config = write_config(run, self.by_name.get(run.parent))
        slot = min(set(range(self.jobs)) - {launch.slot for launch in self.running})
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | devices(slot, self.jobs, self.processes or 1)
        before = len(read_rows(run.folder / "events.jsonl"))
        with open(own(run, ".log"), "ab") as log:
            process = subprocess.Popen(
                [*launcher(self.processes), self.script, str(config)],
                stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
        self.running.append(Launch(run, slot, process, time.monotonic(), before, spent(run)[0]))
        if self.stopping:  # a signal that came while the process was being started has not reached it
            process.send_signal(signal.SIGTERM)

    def _close(self, launch: Launch) -> None:
        """Find out how a launch ended, and write it down where that was not as planned."""
        run, code = launch.run, launch.process.returncode
        told = outcome(run, launch.events)
        self.pace = (
            self.pace[0] + time.monotonic() - launch.started,
            self.pace[1] + max(0.0, spent(run)[0] - launch.flops),
        )
        if told == "finished":
            if not all(math.isfinite(row["loss"]) for row in last_evaluations(run.folder)):
                write_ending(run, Ending("diverged", "its last held-out loss is not finite", {"code": code}))
        elif told == "diverged":
            write_ending(run, Ending("diverged", "too many steps in a row were skipped", {"code": code}))
        elif launch.judged is not None:
            write_ending(run, launch.judged)
        elif self.stopping or told == "out_of_time":
            return
        elif code == INTERRUPTED or told == "interrupted":  # by somebody else, who means all of it
            self.halt()
            return
        elif code == BAD_INPUT:
            words = [line for line in last_words(run) if line.startswith("error: ")]
            self.refused = f"{run.name}: " + (words[-1].removeprefix("error: ") if words else f"see {own(run, '.log')}")
            self.halt()
            return
        else:
            last = (last_words(run) or ["nothing was printed"])[-1]
            write_ending(run, Ending("failed", f"code {code}: {last}", {"code": code, "log": str(own(run, ".log"))}))
        self.ended.add(run.name)
        self._tell(f"{run.name}: {self._result(run)}, {time.monotonic() - launch.started:.0f} s")

    def _result(self, run: Run) -> str:
        found = ending(run)
        if found is not None:
            return f"{found.state}, {found.reason}"
        rows = last_evaluations(run.folder)
        return ", ".join(f"loss {row['loss']:.4f} on {row['set']}" for row in rows) or "finished"

    def _tell(self, text: str) -> None:
        done, total = len(self.ended), len(self.runs)
        share, left = self.progress()
        about = "" if left is None else f", about {duration(left)} left"
        flops = sum(run.flops for run in self.runs)
        print(f"[{done}/{total}] {text}; {100 * share:.0f} % of {flops:.3g} FLOPs{about}", flush=True)

    def progress(self) -> tuple[float, float | None]:
        """The share of all FLOPs that is done or will not be, and the seconds left at the pace of what has run."""
        total = sum(run.flops for run in self.runs)
        left = sum(run.flops - spent(run)[0] for run in self.runs if run.name not in self.ended)
        seconds, flops = self.pace
        if not flops:
            known = [spent(run) for run in self.runs]
            flops, seconds = (sum(each) for each in zip(*known, strict=True))
        return 1 - left / total, seconds / flops * left / self.jobs if flops else None

    def _judge(self) -> None:
        """Stop the runs that are hopeless."""
        for launch in self.running:
            if launch.judged is None and not self.stopping:
                rows = tail(launch.run.folder / "metrics.jsonl", ROWS)
                launch.judged = judge(rows, self.rules(launch.run), self._cell(launch.run))
                if launch.judged is not None:
                    launch.process.send_signal(signal.SIGTERM)

    def rules(self, run: Run) -> Rules:
        """By which a run is judged. A branch in its tail is not compared with others."""
        first = read_first(self.by_name.get(run.parent, run))
        unigram = next(iter(unigram_losses(run.config).values()), None) if self.stop.unigram else None
        margin = self.stop.margin if run.parent is None else None
        return Rules(run.config.schedule.warmup, round(self.stop.after * run.end), first, unigram, margin)

    def _cell(self, run: Run) -> list[list[dict]]:
        """The rows of other runs of the same size, tokens and seed, where they are compared."""
        if self.stop.margin is None or run.parent is not None:
            return []
        alike = [
            each
            for each in self.runs
            if (each.size, each.end, each.config.run.seed, each.parent)
            == (run.size, run.end, run.config.run.seed, None)
        ]
        return [read_rows(each.folder / "metrics.jsonl") for each in alike if each.name != run.name]


def read_first(run: Run) -> float | None:
    """The loss of a run's first logged step."""
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return None
    with open(path, "rb") as file:
        line = file.readline()
    return json.loads(line).get("loss") if line.endswith(b"\n") else None


def devices(slot: int, jobs: int, processes: int) -> dict[str, str]:
    """What gives each of several runs at a time GPUs of its own, or spreads them evenly where there are fewer."""
    if jobs == 1:
        return {}
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = named.split(",") if named else [str(each) for each in range(torch.cuda.device_count())]
    places = len(there) // processes
    if not places:
        return {}
    first = slot % places * processes
    return {"CUDA_VISIBLE_DEVICES": ",".join(there[first : first + processes])}


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
