"""Names at the top of a config, such as ``image_size``, that all of the config follows.

mmengine evaluates a base before the config that inherits it, and merges overrides after both, so
that what a base has computed from a name does not follow when the name is set later. A config with
a base that lists names in ``settings`` is therefore evaluated twice: the first time tells their
final values, those of the command line, else those of the outermost file. Other names follow the
command line alone, where their value was a number, a text, a list or None.
"""

import ast
from collections.abc import Mapping, Set
from difflib import get_close_matches
from typing import Any

from mmengine.config import Config
from mmengine.config import config as mmengine_config
from mmengine.config.utils import RemoveAssignFromAST
from mmengine.fileio import load

from backbones.data.config_datasets import walk
from backbones.errors import ConfigError


def read_config(path: str, options: Mapping[str, Any]) -> Config:
    """mmengine's ``Config.fromfile``, where the names of a config are followed.

    ``options`` are overrides by dotted key; those without a dot are names. They still have to be
    merged into the result. Raises ConfigError where nothing in a config follows a name of its
    settings, as in a saved config, or a name that is almost one of them.
    """
    names = {key: value for key, value in options.items() if '.' not in key}
    if Config._is_lazy_import(path):
        return name_types(Config.fromfile(path))
    config, files = evaluate(path, names)
    declared = set(config.get('settings', ()))
    if not declared:
        return config
    assigned = [names_assigned(file) for file in files]
    # A file with `settings` has the defaults.
    inheriting = set().union(*(each for each in assigned if 'settings' not in each))
    values = {name: config[name] for name in declared & inheriting} | names
    used = set().union(*map(names_read, files))
    for name in declared & values.keys() - used:
        raise ConfigError(
            f'{path}: nothing follows {name} in a config that was saved with everything filled in: '
            'set it in the config that this one was made from'
        )
    for name in (inheriting | names.keys()) - declared - used:
        if meant := get_close_matches(name, declared, 1, 0.84):
            raise ConfigError(f"{path}: nothing follows {name}; did you mean '{meant[0]}'?")
    return evaluate(path, values, declared)[0]


def name_types(config: Config) -> Config:
    """A config with the names of its types in place of classes, as mmengine saves it."""
    config = Config(config.to_dict(), filename=config.filename)
    for node in walk(config._cfg_dict):
        module, _, name = str(node.get('type')).rpartition('.')
        # mmcv and mmdet look these up in mmcv.ops, by the name alone.
        if module.startswith('mmcv.ops') and ('nms' in name or name.startswith('RoI')):
            node.type = name
    return config


# What a file of a config holds: the syntax tree of a Python file, the content of any other.
File = ast.Module | dict


def names_assigned(file: File) -> set[str]:
    """The names that a file sets at its top level."""
    if isinstance(file, dict):
        return set(file)
    return set().union(*map(targets_of, file.body))


def targets_of(statement: ast.stmt) -> set[str]:
    """The names that a statement sets."""
    targets = getattr(statement, 'targets', None) or [getattr(statement, 'target', None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def names_read(file: File) -> set[str]:
    """The names that a file computes with, as they are or as ``_base_.NAME``."""
    if isinstance(file, dict):
        return set()
    read = [node for node in ast.walk(file) if isinstance(getattr(node, 'ctx', None), ast.Load)]
    return {getattr(node, 'attr', None) or getattr(node, 'id', None) for node in read}


def evaluate(
    path: str, values: Mapping[str, Any], computed: Set[str] = frozenset()
) -> tuple[Config, list[File]]:
    """A config with values in place of those that its files assign, and these files.

    Of the names whose value is computed, those in ``computed`` alone get another.
    """
    files: list[File] = []

    class SetValues(RemoveAssignFromAST):
        # mmengine lets it visit every Python file before it evaluates the file.
        def visit_Module(self, node: ast.Module) -> ast.Module:
            files.append(node)
            lists = [each for each in node.body if 'settings' in targets_of(each)]
            parts = ast.walk(ast.Module(lists, []))
            self.settings = {part.value for part in parts if isinstance(part, ast.Constant)}
            return self.generic_visit(node)

        def visit_Assign(self, node: ast.Assign) -> ast.Assign | None:
            self.set_value(node)
            return super().visit_Assign(node)

        def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
            self.set_value(node)
            return node

        def set_value(self, node: ast.Assign | ast.AnnAssign) -> None:
            for name in targets_of(node) & values.keys():
                if name in computed or is_literal(node.value):
                    if name in self.settings:
                        check_kind(name, values[name], node.value)
                    node.value = ast.parse(repr(values[name]), mode='eval').body
                    ast.fix_missing_locations(node)

    def load_and_keep(path: str) -> dict:
        files.append(load(path))
        return files[-1]

    mmengine_config.RemoveAssignFromAST, mmengine_config.load = SetValues, load_and_keep
    try:
        return Config.fromfile(path), files
    finally:
        mmengine_config.RemoveAssignFromAST, mmengine_config.load = RemoveAssignFromAST, load


def check_kind(name: str, value: Any, default: ast.expr) -> None:
    """Raise ConfigError where a setting with a number or a text for a default is neither."""
    # The learning rate's depends on another setting; both are of a kind.
    default = getattr(default, 'body', default)
    kind = type(ast.literal_eval(default)) if is_literal(default) else None
    kinds = (str, int, float) if kind is str else (int, float)
    if kind in (str, bool, int, float) and not isinstance(value, kinds):
        raise ConfigError(
            f'{name} cannot be {value!r}: its default is {ast.unparse(default)}. On the command '
            'line, spaces separate one setting from the next'
        )


def is_literal(expression: ast.expr) -> bool:
    """Whether an expression is a value that stands for itself."""
    try:
        ast.literal_eval(expression)
    except ValueError:
        return False
    return True
