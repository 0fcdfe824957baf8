"""TensorBoard event folders, every point of them: the records are read as they lie, without an accumulator that thins
them out. A record is its length (8 bytes), a checksum of that, the bytes of an Event, and their checksum."""

import struct
from collections import defaultdict
from pathlib import Path

import numpy as np

from scaling.readers.histories import History, Series

PATTERN = "*tfevents*"
OURS = frozenset(("sequences", "segment", "batch_tokens"))
"""Tags that tell an event file of this project, whose axis is tokens."""


def read(folder: Path) -> History:
    """The scalars and texts of all event files of a folder; the steps of a later file come after those of an earlier
    one, as after a resume. A truncated or damaged file is read up to there, and labelled."""
    from tensorboard.compat.proto.event_pb2 import Event

    files = []
    labels = []
    for path in sorted(folder.glob(PATTERN)):
        events, reason = [], ""
        for record in _records(path):
            if record is None:
                reason = f"{path.name} is cut short"
                break
            try:
                events.append(Event.FromString(record))
            except Exception as error:  # protobuf has no error class of its own that is public
                reason = f"{path.name} is damaged after {len(events)} events ({type(error).__name__})"
                break
        if reason:
            labels.append(reason)
        if events:
            files.append((events[0].wall_time, path.name, events))
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    settings: dict[str, str] = {}
    for _, _, events in sorted(files, key=lambda each: each[:2]):
        for event in events:
            for value in event.summary.value:
                _add(value, event.step, points, settings)
    if len(files) > 1:
        labels.append(f"{len(files)} event files")
    series = {tag: Series(*np.array(found, dtype=float).T) for tag, found in points.items()}
    # Megatron logs each scalar twice, once over samples.
    series = {tag: each for tag, each in series.items() if not tag.endswith((" vs samples", " vs steps"))}
    axis = "tokens" if set(series) >= OURS else "steps"
    return History(folder.name, str(folder), series, settings, axis=axis, labels=labels)


def _records(path: Path):
    """The records of a file; a last None where it ends within one."""
    data = memoryview(path.read_bytes())
    at = 0
    while at < len(data):
        if at + 12 > len(data):
            yield None
            return
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            yield None
            return
        yield bytes(data[at + 12 : at + 12 + length])
        at += 16 + length


def _add(value, step: int, points: dict, settings: dict) -> None:
    """Keep one value of a summary: a scalar, simple or as a tensor, or a text that is a setting of the run."""
    if value.HasField("simple_value"):
        points[value.tag].append((step, value.simple_value))
    elif value.HasField("tensor"):
        from tensorboard.util.tensor_util import make_ndarray

        array = make_ndarray(value.tensor)
        if array.size != 1:
            return
        if array.dtype.kind in "fiub":
            points[value.tag].append((step, float(array.reshape(()))))
        elif array.dtype.kind in "OSU":
            item = array.reshape(()).item()
            text = item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
            settings[value.tag.removesuffix("/text_summary")] = text
