"""Run an experiment's arms, one after the other or a few at a time: `python experiments/run.py growth`.

A finished arm is never run again, whichever experiment it was run for; an interrupted one resumes; a failed one is kept
on record, and the queue goes on with the rest. After each arm the experiment is asked again what it still wants: that
is how a sweep over learning rates goes on until its optimum lies inside.
"""

import argparse
import fnmatch
import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.arms import Arm, Results
from experiments.store import Store
from runtime.resilience.exits import BAD_INPUT, FINISHED, INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.5


def main(argv: list[str] | None = None) -> int:
    """Returns 0 where all arms are done, 1 where some failed, 2 for bad input and 75 if interrupted."""
    arguments = parser().parse_args(argv)
    os.chdir(ROOT)
    try:
        experiment = load(arguments.experiment)
        store = Store(arguments.experiment, arguments.size)
        queue = Queue(experiment, store, arguments.only, arguments.jobs)
        if arguments.list:
            print(queue.listing())
            return FINISHED
        if arguments.retry_failed:
            store.forget_failures()
        if not arguments.report_only:
            prepare(experiment, arguments.size)
        code = FINISHED if arguments.report_only else queue.run()
        if code != INTERRUPTED:
            experiment.report(arguments.size, queue.known()[1])
        return code
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("run", description="Run an experiment's arms and write its report; resumable.")
    parser.add_argument("experiment", help="a folder of experiments/, such as growth")
    parser.add_argument("--size", default="cpu", help="cpu (the default) or gpu")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="arms at a time (default: 1)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="arms to run, such as 'scratch*' (default: all)")
    parser.add_argument("--list", action="store_true", help="say which arms are known and how each stands; run nothing")
    parser.add_argument("--report-only", action="store_true", help="write the report from what has run; run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run arms again that failed or diverged")
    return parser


def load(name: str) -> ModuleType:
    """The package of an experiment: `SIZES`, `DATA`, `arms(size, results)` and `report(size, results)`.

    ValueError naming the ones there are, if this is none.
    """
    names = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/__init__.py"))
    if name not in names:
        raise ValueError(f"{name!r} is no experiment; accepted: {', '.join(names)}")
    return importlib.import_module(f"experiments.{name}")


def prepare(experiment: ModuleType, size: str) -> None:
    """Make the token files of an experiment, unless they are there; `DATA[size]` are arguments of launch/prepare.py,
    and an experiment with a second text has a `prepare(size)` of its own for it."""
    *arguments, folder = experiment.DATA[size]
    if not Path(folder, "preparation.json").exists():
        if not arguments:
            where = f"experiments/{experiment.NAME}/README.md"
            raise ValueError(f"{folder} has no preparation.json; see {where} for the data")
        command = [sys.executable, "launch/prepare.py", *arguments, "--out", folder]
        if code := subprocess.run(command, check=False).returncode:
            raise ValueError(f"preparing {folder} ended with code {code}")
    if hasattr(experiment, "prepare"):
        experiment.prepare(size)


@dataclass
class Launch:
    """An arm whose process is at work."""

    arm: Arm
    process: subprocess.Popen
    started: float


@dataclass
class Queue:
    """The arms of one experiment and size, and the processes at work on them."""

    experiment: ModuleType
    store: Store
    only: str = "*"
    jobs: int = 1
    running: list[Launch] = field(default_factory=list)
    stopping: bool = False

    def __post_init__(self) -> None:
        if self.store.size not in self.experiment.SIZES:
            accepted = ", ".join(self.experiment.SIZES)
            raise ValueError(f"--size {self.store.size} is not known to {self.experiment.NAME}; accepted: {accepted}")
        if self.jobs < 1:
            raise ValueError(f"--jobs {self.jobs} is not 1 or more")

    def known(self) -> tuple[list[Arm], Results]:
        """All arms wanted so far, and what became of those that have run. As results lead to further arms, the
        experiment is asked until it wants nothing new."""
        results: dict = {}
        while True:
            arms = self.experiment.arms(self.store.size, results)
            found = {arm.name: result for arm in arms if (result := self.store.find(arm))}
            if found.keys() <= results.keys():
                return arms, results
            results |= found

    def pending(self, arms: list[Arm], results: Results) -> list[Arm]:
        busy = {launch.arm.name for launch in self.running}
        return [
            arm
            for arm in arms
            if arm.name not in results and fnmatch.fnmatch(arm.name, self.only) and arm.name not in busy
        ]

    def run(self) -> int:
        """Run what is wanted until nothing is, or until a signal; returns the exit code."""
        handlers = [signal.signal(each, self._stop) for each in (signal.SIGINT, signal.SIGTERM)]
        try:
            while True:
                arms, results = self.known()
                pending = self.pending(arms, results)
                while pending and len(self.running) < self.jobs and not self.stopping:
                    self._start(pending.pop(0))
                if not self.running:
                    break
                self._wait()
        finally:
            for each, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
                signal.signal(each, handler)
        if self.stopping:
            print("interrupted; the same command goes on", flush=True)
            return INTERRUPTED
        failed = [
            f"{arm.name}: {results[arm.name].problem}"
            for arm in arms
            if arm.name in results and results[arm.name].outcome == "failed"
        ]
        for line in failed:
            print(f"failed  {line}", flush=True)
        return 1 if failed else FINISHED

    def _start(self, arm: Arm) -> None:
        path = self.store.write(arm)
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with open(path.with_suffix(".log"), "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "launch/pretrain.py", str(path)],
                stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
        self.running.append(Launch(arm, process, time.monotonic()))
        if self.stopping:  # a signal that came while the process was being started has not reached it
            process.send_signal(signal.SIGTERM)

    def _wait(self) -> None:
        """Until an arm ends; write down how."""
        while not (ended := [launch for launch in self.running if launch.process.poll() is not None]):
            time.sleep(POLL_SECONDS)
        for launch in ended:
            self.running.remove(launch)
            code = launch.process.returncode
            if code == INTERRUPTED or self.stopping:
                self.stopping = True
                continue
            if code != FINISHED:
                self.store.write_failure(launch.arm, code)
            self._say(launch)

    def _say(self, launch: Launch) -> None:
        arms, results = self.known()
        result = self.store.find(launch.arm)
        told = f"loss {result.loss:.4f}" if result.outcome == "finished" else f"{result.outcome}: {result.problem}"
        minutes = self._seconds_left(arms, results) / 60
        print(
            f"[{len(results)}/{len(arms)}] {launch.arm.name}: {told}, {time.monotonic() - launch.started:.0f} s; "
            f"about {minutes:.0f} min left for the arms known so far",
            flush=True,
        )

    def _seconds_left(self, arms: list[Arm], results: Results) -> float:
        """Of the arms known so far, at the speed of those that have finished."""
        done = [arm for arm in arms if arm.name in results and results[arm.name].outcome == "finished"]
        flops = sum(arm.flops for arm in done)
        pace = sum(results[arm.name].seconds for arm in done) / flops if flops else 0.0
        return pace * sum(arm.flops for arm in self.pending(arms, results)) / self.jobs

    def listing(self) -> str:
        arms, results = self.known()
        lines = []
        for arm in arms:
            result = results.get(arm.name)
            state = "wanted" if result is None else result.outcome
            loss = f"{result.loss:.4f}" if result and result.outcome == "finished" else ""
            lines.append(f"{state:<9} {loss:>7}  {arm.flops:9.3e} FLOPs  {arm.name}")
        return "\n".join([*lines, f"{len(results)} of {len(arms)} arms known so far have run"])

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Have every arm save and end; they stand in sessions of their own, so a terminal's signal reaches only us."""
        self.stopping = True
        for launch in self.running:
            launch.process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
