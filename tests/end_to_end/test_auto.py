"""A run that leaves its rate and batch to a law: it trains by the law's numbers, and goes on by them."""

import json
import tomllib

import numpy as np
import pandas as pd

from runtime.model.config import ModelConfig
from runtime.model.counts import count
from runtime.observe.jsonl import read_rows
from scaling.laws_file import write
from scaling.results import Analysis
from scaling.table import RunTable
from tests.end_to_end.runs import BATCH, STEPS, Launch, finish, write_run
from tests.fits import fit


def write_laws(path, rate: float):
    horizon = STEPS * BATCH
    fits = (
        fit("step_law_lr", {"c": rate * horizon**-0.3, "a": 0.0, "b": 0.3}, spread=1e-2),
        fit("step_law_batch", {"c": BATCH * horizon**-0.5, "b": 0.5}),
    )
    write(path, Analysis(RunTable(pd.DataFrame()), np.empty(0, dtype=bool), (), fits))


def test_a_run_takes_its_numbers_from_the_law_once(tmp_path):
    config, laws = write_run(tmp_path), tmp_path / "laws.json"
    text = config.read_text()
    for number, section in (("sequences = 8", "sequences"), ("lr = 0.001", "lr")):
        assert text.count(f"\n{number}\n") == 1
        text = text.replace(f"\n{number}\n", f'\n{section} = "auto"\n')
    config.write_text(f'{text}\n[law]\nsource = "{laws}"\n')
    write_laws(laws, 2e-3)

    first = finish(config, "auto", overrides=(f"run.until={8 * BATCH}",))
    assert "optim.lr = 0.002 by " in first.output and "95 % interval 0.00" in first.output
    resolved = tomllib.loads((first.folder / "config.toml").read_text())
    assert (resolved["optim"]["lr"], resolved["batch"]["sequences"]) == (0.002, 8)
    law = json.loads((first.folder / "run.json").read_text())["law"]
    assert law["source"] == str(laws)
    rate = law["values"]["optim.lr"]
    assert rate["formula"] == "lr = c * N^a * D^b" and rate["interval"][0] < 0.002 < rate["interval"][1]
    n = count(ModelConfig.model_validate(resolved["model"])).non_embedding
    assert rate["inputs"] == {"N": n, "D": STEPS * BATCH}

    write_laws(laws, 5e-3)
    second = finish(config, "auto")
    assert "optim.lr = 0.002, as in " in second.output
    laws.unlink()
    assert finish(config, "auto").output.count("as in") == 2
    rows = read_rows(second.folder / "metrics.jsonl")
    assert rows[-1]["tokens"] == STEPS * BATCH and max(row["lr"] for row in rows) == 0.002
    assert json.loads((second.folder / "run.json").read_text())["law"] == law

    refused = Launch(config, "new")
    assert refused.wait() == 2 and "neither a laws file nor a published law" in refused.output
    assert not refused.folder.exists()
