"""Running an exported file beside the model that it was made from."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from mmcv.image import imresize

from backbones.errors import ExportError

from .agreement import Results, compare
from .description import Description
from .reference import Reference
from .runner import Runner


@dataclass(frozen=True)
class Case:
    """Inputs that file and model are compared on.

    Attributes:
        name: What they are.
        inputs: (batch, 3, height, width).
    """

    name: str
    inputs: np.ndarray


def check_file(run: Runner, reference: Reference, picture: np.ndarray) -> Iterator[str]:
    """Compare a file with its model on a picture, at two sizes if it takes any, and on none.

    Args:
        run: Runs the file.
        reference: The model.
        picture: (height, width, 3), uint8, BGR.

    Yields:
        A line for each comparison.

    Raises:
        ExportError: They differ.
    """
    description = run.description
    for case in cases(picture, description):
        try:
            found = split(run(case.inputs), description)
        except RuntimeError as error:
            raise ExportError(f'{case.name}: the file does not run: {error}') from error
        for number, expected in enumerate(reference(case.inputs)):
            name = case.name if len(case.inputs) == 1 else f'{case.name}, {number + 1} of a batch'
            try:
                yield f'{name}: {compare(expected, found[number], description)}'
            except ExportError as error:
                raise ExportError(f'{name}: {error}') from error


def cases(picture: np.ndarray, description: Description) -> Iterator[Case]:
    """The picture, the picture at another size where any is taken, and one without contents."""
    if description.size:
        # Without padding, in which all places are as good as each other.
        picture = imresize(picture, description.size[::-1])
        description = replace(description, resize=None)
    # Different pictures in a batch show whether one's results get into another's.
    turned = [picture, picture[:, ::-1], picture[::-1], picture[::-1, ::-1]]
    batch = description.batch or 2
    yield fitted('the picture', [turned[i % 4] for i in range(batch)], description)
    if description.size is None:
        # Odd, not square, and no multiple of any stride.
        size = description.min_size + 134, description.min_size + 58
        other = imresize(picture, size)
        yield fitted('another size', [other] * batch, replace(description, resize=None))
    # Not of one colour, for the same reason.
    noise = np.random.default_rng(0).normal(114, 8, picture.shape)
    blank = noise.clip(0, 255).astype(np.uint8)
    yield fitted('a blank picture', [blank] * batch, description)


def fitted(name: str, pictures: list[np.ndarray], description: Description) -> Case:
    """Pictures of one size as a case."""
    inputs = np.stack([description.fit(picture).inputs for picture in pictures])
    return Case(f'{name} at {inputs.shape[2]}x{inputs.shape[3]}', inputs)


def split(results: dict[str, np.ndarray], description: Description) -> list[Results]:
    """The results of a batch for each of its pictures, without the rows that only fill it up."""
    batch = len(next(iter(results.values())))
    each = [{name: values[i] for name, values in results.items()} for i in range(batch)]
    if description.task != 'detection':
        return each
    return [{name: values[r['labels'] >= 0] for name, values in r.items()} for r in each]
