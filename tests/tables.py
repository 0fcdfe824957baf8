"""Tables of runs on disk, for tests that read them."""

import pandas as pd

from scaling.readers import read


def csv(tmp_path, text, name="t.csv"):
    """A file of this text."""
    path = tmp_path / name
    path.write_text(text)
    return path


def columns(tmp_path, **values):
    """The run table of a CSV file of these columns."""
    path = tmp_path / "t.csv"
    pd.DataFrame(values).to_csv(path, index=False)
    return read([path])
