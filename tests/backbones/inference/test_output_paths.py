"""Results lie where their input says, whatever else is given, and are found there again."""

import os
from pathlib import Path

import pytest

from backbones.errors import ConfigError
from backbones.files import atomic_write
from backbones.inference.inputs import Input, list_inputs
from backbones.inference.output_paths import find_result, plan_jobs, result_stems


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ('a.jpg', 'photos/a.jpg', 'photos/b.png', 'both/a.jpg', 'both/a.png', 'a.b.c'):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ('path', 'stem'),
    [
        ('a.jpg', 'a'),
        ('./photos/../photos/a.jpg', 'photos/a'),
        ('both/a.png', 'both/a.png'),
        ('both/a.jpg', 'both/a.jpg'),
        ('a.b.c', 'a.b.c'),
        ('', '.'),
        ('/data/x/写真 1.jpg', 'data/x/写真 1'),
        ('https://user:secret@host:80/dir/street%20view.jpg', 'host/dir/street view.jpg'),
        ('https://host/dir/view.jpg?size=2', 'host/dir/view.jpg_size=2'),
    ],
)
def test_stems(folder, path, stem):
    assert result_stems([path]) == [stem]
    assert result_stems(['photos/b.png', path])[1] == stem


def test_no_two_inputs_share_a_stem(folder):
    Path('a').touch()
    paths = ['a', 'a.jpg', 'http://h/a.jpg', 'https://h/a.jpg', *('ä' * 120 + end for end in 'xy')]
    stems = result_stems(paths)
    assert len(set(stems)) == len(paths)
    for stem in stems:
        with atomic_write(folder / f'{stem}.json') as temporary:
            temporary.touch()


@pytest.mark.parametrize(
    'url',
    [
        *('http://[camera-ip]/video', 'rtsp://[user:pw@]host', 'http://[::1/x'),
        *(f'https://h/{"x" * 300}/a.jpg', f'https://h/a.jpg?t={"ä" * 150}/y'),
    ],
)
def test_odd_urls_have_names_too(folder, url):
    (job,), _ = plan_jobs([Input(url)], folder, 'refuse', ['drawn'])
    assert job.name and job.file_name
    assert all(0 < len(os.fsencode(part)) <= 255 for part in job.name.split('/'))


def test_every_recording_of_a_camera_is_another(folder):
    assert result_stems(['webcam:0'])[0].startswith('webcam_0_20')
    assert result_stems(['rtsp://user:secret@host:554/cam'])[0].startswith('host/cam_20')


def test_existing_results(folder):
    out = folder / 'out'
    (out / 'drawn' / 'photos').mkdir(parents=True)
    (out / 'drawn' / 'photos' / 'a.jpg').touch()

    def plan(given: str, existing: str, *parts: str) -> tuple[list[str], int]:
        jobs, num_skipped = plan_jobs(list_inputs([given], False, None), out, existing, parts)
        return [job.name for job in jobs], num_skipped

    # Another input is no reason to refuse, nor is a kind of result that is not there yet.
    assert plan('a.jpg', 'refuse', 'drawn', 'data') == (['a'], 0)
    assert plan('photos/a.jpg', 'refuse', 'data') == (['photos/a'], 0)
    for given in ('photos', './photos', str(folder / 'photos')):
        with pytest.raises(ConfigError, match='--skip-existing'):
            plan(given, 'refuse', 'drawn', 'data')
        assert plan(given, 'skip', 'drawn') == (['photos/b'], 1)
        assert plan(given, 'skip', 'drawn', 'data') == (['photos/a', 'photos/b'], 0)
        assert plan(given, 'overwrite', 'drawn') == (['photos/a', 'photos/b'], 0)
    assert find_result(out, 'drawn', 'photos/a') == out / 'drawn' / 'photos' / 'a.jpg'
