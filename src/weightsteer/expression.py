"""Vectors by text: "0.8*honest - 0.5*truncate(rude, rank=16)" -> the vector."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import asdict, replace

from .errors import SteerError
from .records import RunCard
from .vector import WeightVector

FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "filter": ("layers", "modules"),
    "truncate": ("rank", "energy"),
    "project_out": (),
    "lines": ("alpha", "beta"),
    "boost": ("beta",),
}


def combine(expression: str, vectors: Mapping[str, WeightVector]) -> WeightVector:
    """Evaluate `+`, `-`, and `*` and `/` by numbers over named vectors; nothing else is executed.

    A vector's own methods are functions here: `filter(w, layers="8-20", modules="mlp")`, `truncate(w, rank=16)`,
    `project_out(w, other)`, `lines(w, alpha=0.5, beta=1.0)`, `boost(w, beta=0.1)`.

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


def derived_card(card: RunCard, expression: str, vectors: Mapping[str, WeightVector]) -> RunCard:
    """The card of an expression's result: its text, and the cards of what went in."""
    return replace(
        RunCard.now("vector", base_model=card.base_model, base_revision=card.base_revision),
        settings={"expression": expression, "vectors": {name: asdict(vector.card) for name, vector in vectors.items()}},
        data_sha256={f"{n} {key}": value for n, v in vectors.items() for key, value in v.card.data_sha256.items()},
        measured=card.measured,
    )


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
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            return _call(name, args, keywords, vectors, text)
        case ast.BinOp(left=left, op=op, right=right):
            return _binary(_evaluate(left, vectors, text), op, _evaluate(right, vectors, text), text)
    raise SteerError(f"expression {text!r}: only names, numbers, +, -, *, / and {', '.join(FUNCTIONS)} are allowed")


def _call(
    name: str, args: list[ast.expr], keywords: list[ast.keyword], vectors: Mapping[str, WeightVector], text: str
) -> WeightVector:
    """A vector's method: vectors by position, options by name."""
    operands = [_evaluate(arg, vectors, text) for arg in args]
    options = {
        word.arg: word.value.value if isinstance(word.value, ast.Constant) else _evaluate(word.value, vectors, text)
        for word in keywords
        if word.arg
    }
    wanted = FUNCTIONS.get(name)
    expected = f"{name}({', '.join(['vector', *(wanted or ())])})" if wanted is not None else ", ".join(FUNCTIONS)
    count = 2 if name == "project_out" else 1
    if wanted is None or len(operands) != count or not all(isinstance(v, WeightVector) for v in operands):
        raise SteerError(f"expression {text!r}: {name} cannot be called so; expected {expected}")
    if not options.keys() <= set(wanted):
        raise SteerError(f"expression {text!r}: {name} takes {', '.join(wanted) or 'no options'}; expected {expected}")
    try:
        changed: WeightVector = getattr(operands[0], name)(*operands[1:], **options)
    except TypeError:
        raise SteerError(
            f"expression {text!r}: {name} misses an option or has one of the wrong kind; expected {expected}"
        ) from None
    return changed


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
