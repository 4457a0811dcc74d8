"""Names at the top of a config, such as ``image_size``, that all of the config follows.

mmengine evaluates a base before the config that inherits it, and merges overrides after both, so
that what a base has computed from a name does not follow when the name is set later. A base that
lists names in ``settings`` is evaluated with their final values here: those of the command line,
else those of the outermost file. Other names follow the command line alone, where their value was a
number, a text, a list or None.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config
from mmengine.config import config as mmengine_config
from mmengine.config.utils import RemoveAssignFromAST

from backbones.errors import ConfigError

DECLARATION = 'settings'


def read_config(path: str, options: Mapping[str, Any]) -> Config:
    """mmengine's ``Config.fromfile``, where the names of a config are followed.

    Args:
        path: The config.
        options: Overrides by dotted key; those without a dot are names. They still have to be
            merged into the result, for names that no file has.

    Raises:
        ConfigError: Nothing in the config follows a name of its settings, as in a saved config.
    """
    names = {key: value for key, value in options.items() if '.' not in key}
    if Config._is_lazy_import(path):
        return Config.fromfile(path)
    files = list(files_of(path))
    declared = {name for _, tree in files for name in declared_names(tree)}
    if declared:
        names = chosen_values(files, declared) | names
        used = {name for _, tree in files for name in names_read(tree)}
        for name in names:
            if name in declared and name not in used:
                raise ConfigError(
                    f'{path}: nothing follows {name} in a config that was saved with everything '
                    'filled in: set it in the config that this one was made from'
                )
    with values_set(names, declared):
        return Config.fromfile(path)


def files_of(path: str) -> Iterator[tuple[str, ast.Module]]:
    """The Python files that a config consists of with their syntax trees, outermost first."""
    if path.endswith('.py'):
        with TemporaryDirectory() as folder:
            copy = Path(folder, 'config.py')
            # {{ fileDirname }} and {{$DATA_ROOT:data/}}, as in what is evaluated.
            Config._substitute_predefined_vars(path, str(copy))
            Config._substitute_env_variables(str(copy), str(copy))
            yield path, ast.parse(copy.read_text(encoding='utf-8'), path)
        for base in Config._get_base_files(path):
            yield from files_of(Config._get_cfg_path(base, path)[0])


def assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """The names that a file sets at its top level."""
    for node in tree.body:
        match node:
            case ast.Assign([ast.Name(name), *_], value):
                yield name, value
            case ast.AnnAssign(ast.Name(name), value=ast.expr() as value):
                yield name, value


def declared_names(tree: ast.Module) -> Sequence[str]:
    """What a file lists in ``settings``."""
    expression = dict(assignments(tree)).get(DECLARATION)
    return evaluate(expression) if expression else []


def evaluate(expression: ast.expr) -> Any:
    """The value of an expression that needs no other name, else NameError."""
    return eval(compile(ast.Expression(expression), 'a config', 'eval'), {})


def names_read(tree: ast.Module) -> Iterator[str]:
    """The names that a file computes with, as they are or as ``_base_.NAME``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def chosen_values(files: Sequence[tuple[str, ast.Module]], declared: set[str]) -> dict[str, Any]:
    """The values that inheriting configs give to names of the settings, or ConfigError."""
    values: dict[str, Any] = {}
    for path, tree in files:
        if declared_names(tree):
            continue  # it has the defaults
        for name, expression in assignments(tree):
            if name not in declared or name in values:
                continue
            try:
                values[name] = evaluate(expression)
            except NameError as error:
                raise ConfigError(
                    f'{path}: {name} is one of the settings of its base, which is read first: give '
                    f'it a value that stands for itself ({error})'
                ) from error
    return values


@contextmanager
def values_set(names: Mapping[str, Any], declared: set[str]) -> Iterator[None]:
    """Let mmengine evaluate files with these values in place of those that they assign."""

    class SetValues(RemoveAssignFromAST):
        # mmengine lets it visit every file before it evaluates the file.
        def visit_Assign(self, node: ast.Assign) -> ast.Assign | None:
            name = getattr(node.targets[0], 'id', None)
            if name in names and (name in declared or is_literal(node.value)):
                node.value = ast.copy_location(ast.parse(repr(names[name])).body[0].value, node)
                ast.fix_missing_locations(node)
            return super().visit_Assign(node)

    mmengine_config.RemoveAssignFromAST = SetValues
    try:
        yield
    finally:
        mmengine_config.RemoveAssignFromAST = RemoveAssignFromAST


def is_literal(expression: ast.expr) -> bool:
    """Whether an expression is a value that stands for itself."""
    try:
        ast.literal_eval(expression)
    except ValueError:
        return False
    return True
