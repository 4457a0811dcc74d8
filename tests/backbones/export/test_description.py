"""Feeding an exported file."""

import dataclasses

import numpy as np
import pytest

from backbones.export.description import Description

DESCRIPTION = Description(
    task='detection',
    model='a_config',
    classes=('cat', 'dog'),
    palette=[[1, 2, 3], [4, 5, 6]],
    size=(80, 134),
    min_size=1,
    batch=1,
    resize=dict(scale=[133, 80], keep_ratio=True),
    mean=(10.0, 20.0, 30.0),
    std=(1.0, 1.0, 1.0),
    pad_pixel=(30.0, 20.0, 10.0),
    outputs={'boxes': '', 'scores': '', 'labels': ''},
)


def picture(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 200, np.uint8)


def test_a_description_survives_its_file():
    assert Description.from_json(DESCRIPTION.to_json()) == DESCRIPTION


@pytest.mark.parametrize('text', ['', '{}', '[1]', '{"task": "detection"}', 'null'])
def test_other_text_is_no_description(text):
    with pytest.raises(ValueError):
        Description.from_json(text)


@pytest.mark.parametrize(
    ('size', 'inside'),
    [
        pytest.param((48, 64), (80, 107), id='lying'),
        pytest.param((64, 48), (80, 60), id='standing, smaller than the scale says'),
        pytest.param((10, 400), (3, 133), id='very wide'),
    ],
)
def test_a_picture_keeps_its_proportions_in_a_fixed_size(size, inside):
    fitted = DESCRIPTION.fit(picture(*size))
    assert fitted.inputs.shape == (3, 80, 134) and fitted.size == inside
    assert (fitted.inputs[:, : inside[0], : inside[1]] == 200).all()
    assert fitted.inputs[:, -1, -1].tolist() == [30, 20, 10]


def test_a_picture_is_padded_only_to_the_least_size_where_any_is_taken():
    any_size = dataclasses.replace(DESCRIPTION, size=None, min_size=65, resize=None)
    assert any_size.fit(picture(90, 101)).inputs.shape == (3, 90, 101)
    assert any_size.fit(picture(90, 20)).inputs.shape == (3, 90, 65)
