"""The config that a checkpoint carries, read as data.

mmengine keeps it as Python text and runs that to read it, which would let a stranger's checkpoint
run code after all.
"""

import ast
from typing import Any

from mmengine.config import Config

from backbones.errors import CheckpointError


def config_of(checkpoint: dict) -> Config | None:
    """The config that a model was trained with, or None where the checkpoint has none.

    Args:
        checkpoint: As :func:`backbones.weights.load_checkpoint` returns it.

    Raises:
        CheckpointError: The text is more than names and plain values.
    """
    text = checkpoint['meta'].get('cfg')
    if not text:
        return None
    try:
        return Config(parse_assignments(text))
    except (SyntaxError, ValueError, TypeError) as error:
        raise CheckpointError(
            f'the config inside the checkpoint is not plain data: {error}'
        ) from error


def parse_assignments(text: str) -> dict[str, Any]:
    """The values of lines ``name = value``, where a value is a literal or ``dict(key=value)``.

    Raises:
        ValueError: There is anything else in the text.
        SyntaxError: It is not Python.
    """
    values = {}
    for statement in ast.parse(text).body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            raise ValueError(f'line {statement.lineno} is no assignment')
        values[statement.targets[0].id] = evaluate(statement.value)
    return values


def evaluate(node: ast.expr) -> Any:
    """What an expression is worth, if it is a literal or made of them by ``dict(...)``."""
    match node:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords):
            values = {}
            for keyword in keywords:
                value = evaluate(keyword.value)
                values.update(value if keyword.arg is None else {keyword.arg: value})
            return values
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {evaluate(key): evaluate(value) for key, value in pairs}
        case ast.List(elts=items):
            return [evaluate(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(evaluate(item) for item in items)
        case _:
            return ast.literal_eval(node)
