"""A ladder as a Slurm array: a task for each run of most tokens, which then trains its branches."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.ladder_runs import Run
from launch.sweep_store import ENDED, FOLDER, state

SHARED = ("cpus_per_task", "gpus_per_node", "mem_gb", "name")
"""Options that submitit knows on every cluster; all others are Slurm's own."""
CLUSTERS = ("slurm", "local", "debug")
RESTARTS = 1000
"""Times that a task may reach the end of its time: it is queued again, and its run resumes."""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")


def parse_options(text: str) -> dict[str, Any]:
    """What submitit is told, of "key=value,...". ValueError for what is none."""
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"--slurm {part!r} is not of the form key=value, such as partition=gpu")
        if key in ("nodes", "tasks_per_node"):
            raise ValueError(f"--slurm {key}: a run of a sweep is on one machine; its processes are --processes N")
        if key == "cluster" and value not in CLUSTERS:
            raise ValueError(f"--slurm cluster={value}: accepted are {', '.join(CLUSTERS)}")
        if key == "time":
            options["timeout_min"] = _minutes(value)
        elif key == "cluster":
            options["cluster"] = value
        else:
            options[key if key in SHARED else f"slurm_{key}"] = int(value) if value.isdigit() else value
    return options


def _minutes(text: str) -> int:
    """Of "120", "2:00:00" or "1-12:00:00"."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts + ([days] if dash else [])) or len(parts) not in (1, 3):
        raise ValueError(f'--slurm time={text}: accepted are minutes, "hours:minutes:seconds" and "days-..."')
    hours, minutes, seconds = map(int, parts) if len(parts) == 3 else (0, int(parts[0]), 0)
    return int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)


def columns(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs that a task trains, by the name of the first: it and its branches."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.parent or run.name, []).append(run)
    return found


def unfinished(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The columns that still have something to run."""
    by_name = {run.name: run for run in runs}
    return {
        name: column
        for name, column in columns(runs).items()
        if any(state(run, by_name.get(run.parent)) not in ENDED for run in column)
    }


class Column:
    """What a task does. It can be queued again at any moment: its runs save, and go on from there."""

    def __init__(self, ladder: str, processes: int | None):
        self.ladder, self.processes, self.folder = str(Path(ladder).resolve()), processes, os.getcwd()

    def __call__(self, name: str) -> int:
        """Train a column; the exit code, as of the queue."""
        from launch.sweep import open_ladder
        from launch.sweep_queue import Queue

        os.chdir(self.folder)
        ladder, runs = open_ladder(self.ladder, self.processes or 1)
        self.queue = Queue(columns(runs)[name], ladder.stop, processes=self.processes)
        return self.queue.run()

    def checkpoint(self, name: str) -> Any:
        """Before the task is queued again: submitit asks for it in a signal handler."""
        from submitit.helpers import DelayedSubmission

        self.queue.halt()
        for launch in self.queue.running:
            launch.process.wait()
        again = Column(self.ladder, self.processes)
        again.folder = self.folder
        return DelayedSubmission(again, name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "queue"}


def submit(
    ladder: str, runs: Sequence[Run], options: Mapping[str, Any], jobs: int | None, processes: int | None
) -> bool:
    """Submit what is neither finished nor submitted already, at most `jobs` tasks at a time; whether something is left
    to wait for. ValueError where that cannot be."""
    try:
        import submitit
    except ImportError:
        raise ValueError("--slurm needs submitit, which is not installed: pip install meristem[slurm]") from None

    options = dict(options)
    cluster = options.pop("cluster", "slurm")
    folder = runs[0].folder.parent / FOLDER / "slurm"
    waiting = unfinished(runs)
    known = _submitted(folder) if cluster == "slurm" else {}
    at_work = {name for name in waiting if name in known and _is_at_work(folder, known[name])}
    names = [name for name in waiting if name not in at_work]
    if names:
        root = str(Path(__file__).resolve().parents[1])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            executor = submitit.AutoExecutor(str(folder), cluster=cluster, slurm_max_num_timeout=RESTARTS)
            executor.update_parameters(**({"name": runs[0].folder.parent.name} | options))
            if jobs is not None:
                executor.update_parameters(slurm_array_parallelism=jobs)
            submitted = executor.map_array(Column(ladder, processes), names)
        except (NameError, AssertionError, RuntimeError, submitit.core.utils.FailedJobError) as error:
            raise ValueError(f"--slurm: {error}") from None
        if cluster != "slurm":
            _wait(names, submitted)
            return False
        folder.mkdir(parents=True, exist_ok=True)
        known |= {name: job.job_id for name, job in zip(names, submitted, strict=True)}
        (folder / "jobs.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        print(f"submitted {len(names)} tasks as job {submitted[0].job_id.partition('_')[0]}; logs in {folder}")
    if at_work:
        print(f"{len(at_work)} tasks are queued or running already")
    if waiting:
        print("sweep.py --list says how the runs stand; the same command, when all have ended, fits and plans")
    return bool(waiting)


def _wait(names: Sequence[str], submitted: Sequence[Any]) -> None:
    """For tasks on this machine. ValueError naming one that failed."""
    for name, job in zip(names, submitted, strict=True):
        if code := job.result():
            raise ValueError(f"the task of {name} ended with code {code}; see {job.paths.stdout}")


def _submitted(folder: Path) -> dict[str, str]:
    path = folder / "jobs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _is_at_work(folder: Path, job: str) -> bool:
    import submitit

    return not submitit.SlurmJob(folder=folder, job_id=job).state.startswith(OVER)
