"""Sources become units, the same in every run; destinations get whole files of one model."""

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbones.errors import ConfigError

pa = pytest.importorskip('pyarrow', reason='requirements/scale.txt is not installed')
import fsspec  # noqa: E402
import pyarrow.dataset  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from backbones.batch_inference.destination import Destination  # noqa: E402
from backbones.batch_inference.source import list_units, read_unit  # noqa: E402
from backbones.files import atomic_write  # noqa: E402


@pytest.fixture(params=['folder', 'storage'])
def out(request, tmp_path) -> str:
    """A local destination, and one in a storage."""
    if request.param == 'folder':
        return str(tmp_path / 'out')
    return f'memory://{tmp_path.name}/out'


@pytest.fixture
def images(tmp_path) -> Path:
    """25 files, of which 3 are videos by their names; in folders."""
    for number in range(22):
        path = tmp_path / 'in' / str(number % 3) / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(path)
    for number in range(3):
        (tmp_path / 'in' / f'{number}.mp4').touch()
    return tmp_path / 'in'


def inputs_of(units, out: str) -> list[dict]:
    destination = Destination(out)
    return [row for unit in units for table in read_unit(unit, destination)
            for row in table.to_pylist()]  # fmt: skip


def test_every_file_is_in_one_unit(images, out):
    units = list_units(str(images), Destination(out), 8)
    assert sorted(unit.num_inputs for unit in units) == [1, 1, 1, 6, 8, 8]
    assert len({unit.part for unit in units}) == 6
    paths = Counter(row['path'] for row in inputs_of(units, out))
    assert paths == Counter(map(str, images.rglob('*.*')))


def test_what_is_new_is_added(images, out):
    first = list_units(str(images), Destination(out), 8)
    (images / '0' / '0.png').unlink()
    (images / 'a.png').write_bytes(b'new')
    (images / 'b.png').write_bytes(b'new')
    second = list_units(str(images), Destination(out), 5)
    assert second[: len(first)] == first
    assert [row['path'] for row in inputs_of(second[len(first) :], out)] == [
        str(images / 'a.png'),
        str(images / 'b.png'),
    ]


def test_a_list_of_paths_and_urls(images, tmp_path, out):
    lines = [str(images / '0' / '0.png'), 'https://example.com/a.jpg', str(images / '0' / '0.png')]
    (tmp_path / 'list.txt').write_text('\n'.join(lines) + '\n\n')
    units = list_units(str(tmp_path / 'list.txt'), Destination(out), 8)
    assert [row['path'] for row in inputs_of(units, out)] == lines[:2]


def test_a_parquet_set_of_paths(images, tmp_path, out):
    paths = sorted(map(str, images.rglob('*.png')))
    for number in range(2):
        table = pa.table({'id': range(11), 'file_name': paths[number::2]})
        (tmp_path / 'set').mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / 'set' / f'{number}.parquet')
    units = list_units(str(tmp_path / 'set'), Destination(out), 10)
    assert [unit.num_inputs for unit in units] == [10, 10, 2]
    assert sorted(row['path'] for row in inputs_of(units, out)) == paths


def test_relative_paths_in_a_parquet_column(images, tmp_path, out, monkeypatch):
    """Processes that read them run elsewhere."""
    paths = ['in/0/0.png', str(images / '1' / '1.png'), 'https://example.com/a.jpg']
    pq.write_table(pa.table({'path': paths}), tmp_path / 'paths.parquet')
    monkeypatch.chdir(tmp_path)
    units = list_units('paths.parquet', Destination(out), 8)
    expected = [str(images / '0' / '0.png'), *paths[1:]]
    assert [row['path'] for row in inputs_of(units, out)] == expected


def test_what_does_not_exist_in_a_list_is_an_input(images, tmp_path, out):
    """So that a row says what is wrong with it."""
    lines = [images / '0' / '0.png', images / 'missing.png', images / '*.jpg', images / '1.mp4']
    (tmp_path / 'list.txt').write_text('\n'.join(map(str, lines)))
    units = list_units(str(tmp_path / 'list.txt'), Destination(out), 8)
    assert sorted(row['path'] for row in inputs_of(units, out)) == sorted(map(str, lines))
    (tmp_path / 'list.txt').write_text('\n')
    with pytest.raises(ConfigError, match='no paths'):
        list_units(str(tmp_path / 'list.txt'), Destination(out), 8)


def test_a_folder_that_cannot_be_searched(images, out, monkeypatch):
    """No input is lost in silence. As root, every folder can be."""
    walk = os.walk

    def refuse(folder, onerror, **options):
        onerror(PermissionError(13, 'Permission denied', f'{folder}/secret'))
        return walk(folder, **options)

    monkeypatch.setattr('os.walk', refuse)
    with pytest.raises(ConfigError, match='secret'):
        list_units(str(images), Destination(out), 8)


def test_other_files_beside_images_are_left_out(images, out, capsys):
    expected = set(map(str, images.rglob('*.*')))
    for name in ('0/notes.txt', 'README', 'labels.parquet'):
        (images / name).write_text('x')
    units = list_units(str(images), Destination(out), 8)
    assert {row['path'] for row in inputs_of(units, out)} == expected
    assert '3' in capsys.readouterr().out


def test_files_without_a_known_suffix_are_inputs_where_there_are_no_others(tmp_path, out):
    for name in ('in/a', 'in/b.dat'):
        Destination(str(tmp_path)).write(name, b'x')
    units = list_units(str(tmp_path / 'in'), Destination(out), 8)
    assert [Path(row['path']).name for row in inputs_of(units, out)] == ['a', 'b.dat']


@pytest.mark.parametrize('name', ['a.parquet', 'A.PARQUET'])
def test_other_files_beside_parquet_files_are_left_out(name, tmp_path, out):
    """As Spark writes them."""
    (tmp_path / 'set').mkdir()
    for other in ('_SUCCESS', 'README.md'):
        (tmp_path / 'set' / other).touch()
    pq.write_table(pa.table({'bytes': [b'1', b'2']}), tmp_path / 'set' / name)
    units = list_units(str(tmp_path / 'set'), Destination(out), 8)
    assert [row['bytes'] for row in inputs_of(units, out)] == [b'1', b'2']


@pytest.mark.parametrize('is_local', [True, False])
def test_a_destination_in_the_source(is_local, images, tmp_path):
    """The second time finds no results of the first."""
    source = str(images)
    if not is_local:
        source = f'memory://{tmp_path.name}/in'
        fsspec.filesystem('memory').put(str(images), f'/{tmp_path.name}/in', recursive=True)
    destination = Destination(f'{source}/out')
    first = list_units(source, destination, 8)
    for name in (first[0].part, '_drawn/0/0.jpg'):
        destination.write(name, b'')
    assert list_units(source, destination, 8) == first
    with pytest.raises(ConfigError, match='results'):
        list_units(f'{source}/out', destination, 8)


@pytest.mark.parametrize('kind', ['binary', 'binary with paths', 'struct', 'struct with paths'])
def test_a_parquet_file_of_images(kind, images, tmp_path, out):
    contents = [path.read_bytes() for path in sorted(images.rglob('*.png'))]
    names = list(map(str, range(22)))
    # As of Hugging Face's datasets.
    structs = [{'bytes': content, 'path': 'a.png'} for content in contents]
    columns = {
        'binary': {'image': contents},
        'binary with paths': {'jpg': contents, 'path': names},
        'struct': {'image': structs},
        'struct with paths': {'image': structs, 'file_name': names},
    }[kind]
    file = tmp_path / 'images.parquet'
    pq.write_table(pa.table(columns), file, row_group_size=10)
    units = list_units(str(file), Destination(out), 3)
    assert [unit.num_inputs for unit in units] == [10, 10, 2]
    rows = inputs_of(units, out)
    assert [row['bytes'] for row in rows] == contents
    expected = names if 'with paths' in kind else [f'{file}/{name}' for name in names]
    assert [row['path'] for row in rows] == expected


def test_parquet_without_images(tmp_path):
    pq.write_table(pa.table({'number': [1]}), tmp_path / 'a.parquet')
    with pytest.raises(ConfigError, match='number'):
        list_units(str(tmp_path / 'a.parquet'), Destination(str(tmp_path / 'out')), 8)
    (tmp_path / 'b.parquet').write_bytes(b'nothing')
    with pytest.raises(ConfigError, match=r'b\.parquet'):
        list_units(str(tmp_path / 'b.parquet'), Destination(str(tmp_path / 'out')), 8)


@pytest.mark.parametrize('source', ['nowhere', 'memory://nowhere', 'nowhere.txt', 'webcam:0'])
def test_sources_that_are_none(source, tmp_path):
    with pytest.raises(ConfigError):
        list_units(source, Destination(str(tmp_path / 'out')), 8)


def test_a_destination_of_another_model(out):
    destination = Destination(out)
    destination.claim({'model': 'a', 'options': '{}'})
    # Nothing was done yet.
    destination.claim({'model': 'b', 'options': '{}'})
    destination.write('part-1.parquet', b'')
    destination.claim({'model': 'b', 'options': '{}'})
    with pytest.raises(ConfigError, match='options'):
        destination.claim({'model': 'b', 'options': '{"every": 2}'})


def test_a_destination_with_other_files(out):
    Destination(out).write('photo.jpg', b'')
    with pytest.raises(ConfigError, match='empty'):
        Destination(out).claim({'model': 'a'})


def test_files_are_whole(out, tmp_path):
    destination = Destination(out)
    destination.write('a/b', b'1' * 1000)
    (tmp_path / 'local').write_bytes(b'2' * 1000)
    destination.commit(tmp_path / 'local', 'c')
    assert destination.names() == ['a', 'c']
    assert (destination.names('a'), destination.names('nowhere')) == (['b'], [])
    assert destination.fs.cat_file(destination.path('c')) == b'2' * 1000
    with pytest.raises(OSError):
        destination.commit(tmp_path / 'missing', 'd')
    assert destination.has('c')
    assert not destination.has('d')
    assert len(destination.names()) == 2


def test_what_a_killed_process_left_is_not_read(images, tmp_path):
    """Neither by the same command nor by those who read the results."""
    out = tmp_path / 'out'
    units = list_units(str(images), Destination(str(out)), 8)
    for path in (out / '_inputs' / '0001.parquet', out / units[0].part):
        with atomic_write(path) as temporary:
            temporary.write_bytes(b'half')
            shutil.copy(temporary, tmp_path / 'half')
            left = temporary
        path.unlink()
        shutil.move(tmp_path / 'half', left)
    pq.write_table(pa.table({'path': ['a']}), out / units[1].part)
    assert list_units(str(images), Destination(str(out)), 8) == units
    assert Destination(str(out)).names() == ['_inputs', units[1].part]
    assert pyarrow.dataset.dataset(out, format='parquet').to_table().num_rows == 1


def test_drawings_have_names_that_files_can_have(tmp_path, monkeypatch):
    """Those that paths have in a Parquet file too, and the same wherever a process was started."""
    from backbones.batch_inference.job import drawn_name

    signed = f'https://bucket.host/photos/a.jpg?Signature={"x" * 300}'
    paths = [signed, f'{signed}y', str(tmp_path / 'in/a.jpg'), 'b.jpg', '../../c.jpg', 'd' * 240]
    (tmp_path / 'in').mkdir()
    names = []
    for folder in (tmp_path, tmp_path / 'in'):
        monkeypatch.chdir(folder)
        names.append([drawn_name(path) for path in paths])
    assert names[0] == names[1]
    assert names[0][2:5] == [str(tmp_path / 'in/a.jpg')[1:], 'b.jpg', 'c.jpg']
    destination = Destination(str(tmp_path / 'out'))
    for name in names[0]:
        destination.write(f'_drawn/{name}.jpg', b'')
    assert len(list((tmp_path / 'out/_drawn').rglob('*.jpg'))) == len(paths)


def test_a_worker_writes_each_unit_once(images, tmp_path, out, shapes):
    """Without Ray: images from a Parquet file, and what a retry finds."""
    from trained_tiny import write_trained

    from backbones.batch_inference.job import Worker

    contents = [path.read_bytes() for path in sorted(images.rglob('*.png'))]
    buffer = io.BytesIO()
    pq.write_table(pa.table({'bytes': [*contents, b'bad']}), buffer, row_group_size=12)
    fsspec.filesystem('memory').pipe_file(f'/{tmp_path.name}/in/images.parquet', buffer.getvalue())
    config, checkpoint = write_trained(tmp_path, 'retinanet', shapes)
    model = dict(config=str(config), checkpoint=str(checkpoint), score_thr=0.0)
    worker = Worker(out, model, {'model': 'x'}, draw=True)
    units = list_units(f'memory://{tmp_path.name}/in', worker.destination, 8)
    reports = [worker(unit._asdict()) for unit in units]
    assert reports[0] == dict(inputs=12, rows=12, problems=0, error='')
    assert reports[1] == dict(inputs=11, rows=11, problems=1, error='')
    assert worker(units[0]._asdict())['rows'] == 0

    files = [pq.read_table(worker.destination.fs.open(worker.destination.path(unit.part)))
             for unit in units]  # fmt: skip
    assert files[0].schema.metadata[b'model'] == b'x'
    assert 'square' in json.loads(files[0].schema.metadata[b'classes'])
    rows = [row for file in files for row in file.to_pylist()]
    assert [row['path'].rpartition('/')[2] for row in rows] == list(map(str, range(23)))
    assert [row['problem'] is None for row in rows] == [True] * 22 + [False]
    assert all(row['masks'] is None for row in rows), 'a RetinaNet has none'
    drawn = worker.destination.fs.find(worker.destination.path('_drawn'))
    assert len(drawn) == 22


@pytest.mark.parametrize(('lost', 'is_done'), [(TimeoutError, False), (FileNotFoundError, True)])
def test_a_storage_that_does_not_answer(lost, is_done, images, tmp_path, shapes, monkeypatch):
    """Its images are there later; one that is missing is a row with a problem."""
    from trained_tiny import write_trained

    from backbones.batch_inference.job import Worker

    memory = fsspec.filesystem('memory')
    memory.put(str(images / '0'), f'/{tmp_path.name}/in', recursive=True)
    config, checkpoint = write_trained(tmp_path, 'retinanet', shapes)
    model = dict(config=str(config), checkpoint=str(checkpoint))
    worker = Worker(str(tmp_path / 'out'), model, {})
    [unit] = list_units(f'memory://{tmp_path.name}/in', worker.destination, 100)
    read = type(memory)._open

    def lose_one(self, path, *arguments, **options):
        if path.endswith('/3.png'):
            raise lost(path)
        return read(self, path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), '_open', lose_one)
        report = worker(unit._asdict())
    assert worker.destination.has(unit.part) == is_done
    assert report['problems'] == is_done
    assert bool(report['error']) != is_done
    assert is_done or worker(unit._asdict())['rows'] == 8
