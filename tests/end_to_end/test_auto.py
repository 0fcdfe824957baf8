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
from tests.end_to_end.runs import BATCH, STEPS, main, write_run
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

    code, said = main(0, [str(config), "run.name=auto", f"run.until={8 * BATCH}"])
    assert code == 0, said
    assert "optim.lr = 0.002 by " in said and "95 % interval 0.00" in said
    folder = tmp_path / "runs" / "auto"
    resolved = tomllib.loads((folder / "config.toml").read_text())
    assert (resolved["optim"]["lr"], resolved["batch"]["sequences"]) == (0.002, 8)
    law = json.loads((folder / "run.json").read_text())["law"]
    assert law["source"] == str(laws)
    rate = law["values"]["optim.lr"]
    assert rate["formula"] == "lr = c * N^a * D^b" and rate["interval"][0] < 0.002 < rate["interval"][1]
    n = count(ModelConfig.model_validate(resolved["model"])).non_embedding
    assert rate["inputs"] == {"N": n, "D": STEPS * BATCH}

    laws.unlink()
    code, said = main(0, [str(config), "run.name=auto"])
    assert code == 0, said
    assert "optim.lr = 0.002, as in " in said
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["tokens"] == STEPS * BATCH and max(row["lr"] for row in rows) == 0.002
    assert json.loads((folder / "run.json").read_text())["law"] == law

    code, said = main(0, [str(config), "run.name=new"])
    assert code == 2 and "neither a laws file nor a published law" in said
    assert not (tmp_path / "runs" / "new").exists()
