"""What the models on a command line are."""

from backbones.app.models import name_models, pair_up


def test_configs_checkpoints_and_exported_files_mix():
    given = ['a.py', 'a.pth', 'b.onnx', 'd.py', 'd.safetensors', 'e.xml']
    models = [
        ('a.py', 'a.pth'),
        ('b.onnx', None),
        ('d.py', 'd.safetensors'),
        ('e.xml', None),
    ]
    assert pair_up(given) == models
    assert name_models(models) == ['a', 'b', 'd', 'e']


def test_no_two_names_are_the_same():
    models = [('a.py', 'one/best.pth'), ('a.py', 'two/best.pth'), ('b/a.py', 'two/best.pth')]
    names = name_models([*models, *models])
    expected = ['one best', 'two best', 'two best #2', 'one best #2', 'two best #3', 'two best #4']
    assert names == expected


def test_exported_files_beside_their_checkpoint_have_their_suffix(tmp_path, monkeypatch):
    (tmp_path / 'runs').mkdir()
    monkeypatch.chdir(tmp_path / 'runs')
    models = [('m.py', 'm.pth'), ('m.xml', None), ('m.onnx', None)]
    assert name_models(models) == ['runs m', 'm.xml', 'm.onnx']
