"""Predictions as Arrow tables, for engines that spread tables over machines: Ray, Spark, Daft."""

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import chain
from typing import TYPE_CHECKING, Any

from backbones.errors import import_optional

from .inferencer import Inferencer
from .inputs import Input
from .masks import encode_mask
from .pipeline import Pipeline
from .reading import Clip, Closed, Frame, Stream, read_inputs
from .results import Detections, encode_seg_map

if TYPE_CHECKING:
    import pyarrow as pa

# A table of results ends after this many rows, or bytes of segmentation maps.
MAX_ROWS = 256
MAX_BYTES = 2**26


class Predictor:
    """Predicts for the rows of tables, several images at a time.

    Input tables have a column ``path``, a column ``bytes`` with encoded images, or both; other
    columns are left out. docs/scale.md shows a call and the columns of the results. If an input
    fails, its row says why; the others are still predicted.

    Args:
        config, checkpoint, options: Of :class:`.Inferencer`, whose errors are raised too.
        every: Use every N-th frame of a video. Default: all frames.

    Attributes:
        schema: The columns of the results; the class names are in its metadata.
        inferencer: The model that predicts.

    Raises:
        ConfigError: The package pyarrow is not installed.
    """

    def __init__(
        self,
        config: str | os.PathLike,
        checkpoint: str | os.PathLike | None = None,
        *,
        every: int = 1,
        **options: Any,
    ) -> None:
        self._arrow = import_optional('pyarrow', 'Predictor', 'scale')
        self.inferencer = Inferencer(config, checkpoint, **options)
        self.schema = schema_of(self.inferencer.task, self.inferencer.classes)
        self._clip = Clip(every)

    def __call__(self, table: 'pa.Table') -> 'pa.Table':
        """Return the results for all rows of a table, in order."""
        results = list(self.stream([table]))
        return self._arrow.concat_tables(results) if results else self.schema.empty_table()

    def stream(
        self,
        tables: Iterable['pa.Table | pa.RecordBatch'],
        finish: Callable[[Frame], None] = lambda frame: None,
        fail: Callable[[Closed], None] = lambda closed: None,
    ) -> Generator['pa.Table', None, None]:
        """Yield the results for all rows of many tables, in order, as for Spark's ``mapInArrow``.

        ``finish`` is called with each image that has a prediction, in several threads, and ``fail``
        with each input that cannot be read.
        """
        frames = read_inputs(chain.from_iterable(map(inputs_of, tables)), self._clip)
        pipeline = Pipeline(self.inferencer, self.inferencer.batch_size)

        def to_row(frame: Frame) -> None:
            if not frame.problem:
                finish(frame)
            frame.record = self._row(frame)
            frame.image = frame.prediction = None

        rows, num_bytes = [], 0
        with closing(pipeline.run(frames, to_row)) as finished:
            for item in finished:
                if isinstance(item, Frame):
                    rows.append(item.record)
                    num_bytes += len(item.record.get('seg_map') or b'')
                elif isinstance(item, Closed) and item.problem:
                    fail(item)
                    rows.append({'path': item.input.shown, 'problem': item.problem})
                if len(rows) == MAX_ROWS or num_bytes > MAX_BYTES:
                    yield self._arrow.Table.from_pylist(rows, self.schema)
                    rows, num_bytes = [], 0
        if rows:
            yield self._arrow.Table.from_pylist(rows, self.schema)

    def _row(self, frame: Frame) -> dict[str, Any]:
        row = {'path': frame.input.shown, 'problem': frame.problem}
        if isinstance(frame.stream, Stream):
            row |= {'frame': frame.index, 'time': frame.time}
        if frame.image is not None:
            row['height'], row['width'] = size = frame.image.shape[:2]
        if isinstance(frame.prediction, Detections):
            found = frame.prediction
            row |= {'boxes': found.boxes.tolist(), 'scores': found.scores.tolist()}
            row['labels'] = found.labels.tolist()
            if found.masks is not None:
                row['masks'] = [encode_mask(mask, size) for mask in found.masks]
        elif frame.prediction is not None:
            palette = self.inferencer.visualizer.palette
            row['seg_map'] = encode_seg_map(frame.prediction, palette)
        return row


def schema_of(task: str, classes: Iterable[str]) -> 'pa.Schema':
    """Return the columns of the results of a 'detection' or 'segmentation'."""
    pa = import_optional('pyarrow', 'Predictor', 'scale')
    mask = pa.struct({'size': pa.list_(pa.int32(), 2), 'counts': pa.string()})
    columns = {
        'path': pa.string(),
        'frame': pa.int32(),
        'time': pa.float64(),
        'width': pa.int32(),
        'height': pa.int32(),
    }
    if task == 'segmentation':
        columns['seg_map'] = pa.binary()
    else:
        columns['boxes'] = pa.list_(pa.list_(pa.float32(), 4))
        columns |= {'scores': pa.list_(pa.float32()), 'labels': pa.list_(pa.int32())}
        columns['masks'] = pa.list_(mask)
    columns['problem'] = pa.string()
    return pa.schema(columns, {'task': task, 'classes': json.dumps(list(classes))})


def inputs_of(table: 'pa.Table | pa.RecordBatch') -> Iterator[Input]:
    """Yield an input for each row of a table with columns ``path``, ``bytes`` or both."""
    names = table.schema.names
    nulls = [None] * table.num_rows
    paths = table.column('path').to_pylist() if 'path' in names else nulls
    # One after another: as Python's objects the images would be in memory twice.
    images = table.column('bytes') if 'bytes' in names else None
    for number, path in enumerate(paths):
        data = images[number].as_py() if images is not None else None
        problem = None if path or data else 'has neither a path nor bytes'
        yield Input(path or f'row {number}', problem=problem, data=data)
