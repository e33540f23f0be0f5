"""Vectors by text: "0.8*honest - 0.5*sycophantic" -> the exact sum."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from .errors import SteerError
from .vector import WeightVector


def combine(expression: str, vectors: Mapping[str, WeightVector]) -> WeightVector:
    """Evaluate `+`, `-`, and `*` and `/` by numbers over named vectors; nothing else is executed.

    Raises:
        SteerError: a syntax error, an unknown name, or a result that is not a vector.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError:
        raise SteerError(
            f"expression {expression!r}: cannot be read; expected such as '0.8*honest - 0.5*rude'"
        ) from None
    value = _evaluate(tree.body, vectors, expression)
    if not isinstance(value, WeightVector):
        raise SteerError(f"expression {expression!r}: gives a number, expected a vector")
    return value


def _evaluate(node: ast.expr, vectors: Mapping[str, WeightVector], text: str) -> WeightVector | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.Name(id=name):
            if name not in vectors:
                known = ", ".join(sorted(vectors)) or "none"
                raise SteerError(f"expression {text!r}: unknown vector {name!r}; known: {known}")
            return vectors[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _evaluate(operand, vectors, text) * -1.0
        case ast.BinOp(left=left, op=op, right=right):
            return _binary(_evaluate(left, vectors, text), op, _evaluate(right, vectors, text), text)
    raise SteerError(f"expression {text!r}: only names, numbers, +, -, * and / are allowed")


def _binary(
    left: WeightVector | float, op: ast.operator, right: WeightVector | float, text: str
) -> WeightVector | float:
    match op, left, right:
        case ast.Add(), WeightVector(), WeightVector():
            return left + right
        case ast.Sub(), WeightVector(), WeightVector():
            return left - right
        case ast.Mult(), float(), WeightVector() | float():
            return right * left
        case ast.Mult(), WeightVector(), float():
            return left * right
        case ast.Div(), WeightVector() | float(), float() if right != 0.0:
            return left * (1.0 / right)
    raise SteerError(f"expression {text!r}: vectors add and subtract, and are multiplied or divided by numbers")
