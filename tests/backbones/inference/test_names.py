"""Output names are recognisable, safe, and never twice the same."""

import pytest

from backbones.inference.names import output_stems


@pytest.mark.parametrize(
    ('inputs', 'stems'),
    [
        (['a.jpg', 'sub/b.png'], ['a', 'sub/b']),
        (['a.jpg', 'a.png', 'b.jpg'], ['a_jpg', 'a_png', 'b']),
        (['a.jpg', 'a.jpg'], ['a_jpg', 'a_jpg_2']),
        (['A.jpg', 'a.jpg'], ['A_jpg', 'a_jpg_2']),
        (['a.jpg', 'a.png', 'a_jpg.jpg'], ['a_jpg', 'a_png', 'a_jpg_2']),
        (['webcam:0'], ['webcam_0']),
        (['http://host:80/dir/street%20view.jpg?size=2'], ['street view']),
        (['rtsp://user:secret@camera.local:554/'], ['camera_local']),
        (['../../etc/passwd', '/root/x.jpg'], ['etc/passwd', 'root/x']),
        (['写真 1.jpg', 'Ünï.v2.png'], ['写真 1', 'Ünï.v2']),
        (['.jpg', '..'], ['.jpg', 'input']),
    ],
)
def test_stems(inputs, stems):
    assert output_stems(inputs) == stems


def test_names_that_are_taken_are_not_given_again():
    assert output_stems(['a.jpg', 'b.jpg'], taken={'A', 'a_2'}) == ['a_3', 'b']
