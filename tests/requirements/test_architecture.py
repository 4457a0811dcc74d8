"""Imports run one way, and what only some users have is imported where it is used."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# As in docs/architecture.md, from the network up; what stands in one row may import its neighbors.
ROWS = (
    {'errors', 'files', 'progress'},
    {'efficientformer_v2'},
    {'data', 'deploy', 'light_ham', 'roi_align', 'weights'},
    {'engine'},
    {'inference'},
    {'export'},
    {'benchmark'},
    {'app', 'batch_inference', 'report', 'search'},
)
LEVELS = {room: level for level, row in enumerate(ROWS) for room in row}
# Who has mmdet alone detects, who has mmseg alone segments; the others are extras.
OPTIONAL = {
    *('av', 'coremltools', 'gradio', 'mmdet', 'mmseg', 'nncf', 'onnx', 'onnxruntime', 'onnxscript'),
    *('openvino', 'pandas', 'pillow_heif', 'pyarrow', 'pymoo', 'ray', 'skimage', 'supervision'),
}
# Modules that are imported for one of them.
MADE_FOR = {
    'av': {'audio_track', 'camera', 'video_reader', 'video_writer'},
    'gradio': {'page'},
    'mmseg': {'light_ham'},
    'pyarrow': {'destination', 'job', 'source'},
}


def imports(node: ast.AST, runs: bool = True) -> Iterator[tuple[str, bool]]:
    """Names of imported modules, or in them, and whether importing the file imports them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, runs) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            start = '.' * child.level + (f'{child.module}.' if child.module else '')
            yield from ((start + alias.name, runs) for alias in child.names)
        elif not (isinstance(child, ast.If) and 'TYPE_CHECKING' in ast.unparse(child.test)):
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, runs and not is_function)


def test_imports_run_one_way_and_extras_are_imported_where_they_are_used():
    files = [path for path in (ROOT / 'backbones').rglob('*.py') if '.mim' not in path.parts]
    assert len(files) > 100
    wrong = []
    for path in files:
        parts = path.relative_to(ROOT).with_suffix('').parts
        room = parts[1]
        for name, runs in imports(ast.parse(path.read_text(encoding='utf-8'))):
            level = len(name) - len(name.lstrip('.'))
            whole = [*parts[: len(parts) - level], *name.lstrip('.').split('.')] if level else []
            whole = whole or name.split('.')
            if whole[0] == 'backbones' and room != '__init__':
                other = whole[1] if len(whole) > 1 else room
                if other != room and LEVELS.get(other, 0) > LEVELS[room]:
                    wrong.append(f'{path} imports {".".join(whole)}')
            elif whole[0] in OPTIONAL and runs and path.stem not in MADE_FOR.get(whole[0], ()):
                wrong.append(f'{path} imports {whole[0]} wherever it is imported')
    assert not wrong


def test_all_ways_to_import_a_room_are_seen():
    for line in ('from backbones import search', 'import backbones.search'):
        assert list(imports(ast.parse(line))) == [('backbones.search', True)]
    assert list(imports(ast.parse('from .. import search'))) == [('..search', True)]
