"""Names at the top of a config, such as ``image_size``, on which the rest of the config depends.

mmengine evaluates a base before the config that inherits it, and merges overrides after both. So
values that a base computes from a name would not change when the name is set later. A config with
a base that lists names in ``settings`` is therefore evaluated twice: the first time finds their
final values, from the command line, else from the outermost file. Other names are set by the
command line only, and only if their value is a literal: a number, a text, a list or None.
"""

import ast
from collections.abc import Mapping, Set
from difflib import get_close_matches
from typing import Any

from mmengine.config import Config
from mmengine.config import config as mmengine_config
from mmengine.config.utils import RemoveAssignFromAST

from backbones.data.config_datasets import walk
from backbones.errors import ConfigError


def read_config(path: str, options: Mapping[str, Any]) -> Config:
    """Read a config like mmengine's ``Config.fromfile``, with the final values of its settings.

    ``options`` are overrides by dotted key; those without a dot are names. They still have to be
    merged into the result. Raises ConfigError if nothing in the config depends on a setting, as in
    a saved config, or if an unknown name is similar to a setting.
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
            f'{path}: nothing follows {name}, since this is a saved config with all values filled '
            'in: set it in the config that this one was made from'
        )
    for name in (inheriting | names.keys()) - declared - used:
        if meant := get_close_matches(name, declared, 1, 0.84):
            raise ConfigError(f"{path}: nothing follows {name}; did you mean '{meant[0]}'?")
    return evaluate(path, values, declared)[0]


def name_types(config: Config) -> Config:
    """Replace classes in a config by the names of the types, as mmengine saves it."""
    config = Config(config.to_dict(), filename=config.filename)
    for node in walk(config._cfg_dict):
        module, _, name = str(node.get('type')).rpartition('.')
        # mmcv and mmdet look these up in mmcv.ops by name.
        if module.startswith('mmcv.ops') and ('nms' in name or name.startswith('RoI')):
            node.type = name
    return config


def names_assigned(file: ast.Module) -> set[str]:
    """Return the names that a file sets at its top level."""
    return set().union(*map(targets_of, file.body))


def targets_of(statement: ast.stmt) -> set[str]:
    """Return the names that a statement sets."""
    targets = getattr(statement, 'targets', None) or [getattr(statement, 'target', None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def names_read(file: ast.Module) -> set[str]:
    """Return the names that a file uses, directly or as ``_base_.NAME``."""
    read = [node for node in ast.walk(file) if isinstance(getattr(node, 'ctx', None), ast.Load)]
    return {getattr(node, 'attr', None) or getattr(node, 'id', None) for node in read}


def evaluate(
    path: str, values: Mapping[str, Any], computed: Set[str] = frozenset()
) -> tuple[Config, list[ast.Module]]:
    """Evaluate a config with ``values`` instead of those in its files; return it and its files.

    Names whose value is computed are replaced only if they are in ``computed``.
    """
    files: list[ast.Module] = []

    class SetValues(RemoveAssignFromAST):
        # mmengine calls it with every file before it evaluates the file.
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

    mmengine_config.RemoveAssignFromAST = SetValues
    try:
        return Config.fromfile(path), files
    finally:
        mmengine_config.RemoveAssignFromAST = RemoveAssignFromAST


def check_kind(name: str, value: Any, default: ast.expr) -> None:
    """Raise ConfigError if a setting is neither a number nor a text, as its default is."""
    # The default of the learning rate depends on another setting; both choices are of one type.
    default = getattr(default, 'body', default)
    kind = type(ast.literal_eval(default)) if is_literal(default) else None
    kinds = (str, int, float) if kind is str else (int, float)
    if kind in (str, bool, int, float) and not isinstance(value, kinds):
        raise ConfigError(
            f'{name} cannot be {value!r}: its default is {ast.unparse(default)}. On the command '
            'line, separate settings by spaces'
        )


def is_literal(expression: ast.expr) -> bool:
    """Return whether an expression is a literal."""
    try:
        ast.literal_eval(expression)
    except ValueError:
        return False
    return True
