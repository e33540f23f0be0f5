"""Vectors by text: "0.8*honest - 0.5*truncate(rude, rank=16)" -> the vector. The one grammar of such texts."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from ..errors import SteerError
from ..former_names import FUNCTIONS as FORMER_FUNCTIONS
from ..run_card import RunCard
from ..schema import LARGEST_FLOAT, shown
from .weight_vector import WeightVector

FUNCTIONS: Mapping[str, tuple[str, ...]] = {  # methods of a vector -> their options
    "filter": ("layers", "modules"),
    "truncate": ("rank", "energy"),
    "project_out": (),
    "scale_by_depth": ("alpha", "beta"),
    "boost_subspace": ("beta",),
}
ALLOWED = f"only names, numbers, +, -, *, / and {', '.join(FUNCTIONS)} are allowed"
LONGEST = 10_000  # characters
OF_TWO = ("project_out",)  # functions of two vectors; the others are of one


def combine(expression: str, vectors: Mapping[str, WeightVector]) -> WeightVector:
    """Evaluate `+`, `-`, and `*` and `/` by numbers over named vectors; nothing else is executed.

    A vector's own methods are functions here: `filter(w, layers="8-20", modules="mlp")`, `truncate(w, rank=16)`,
    `project_out(w, other)`, `scale_by_depth(w, alpha=0.5, beta=1.0)`, `boost_subspace(w, beta=0.1)`.

    Raises:
        SteerError: a syntax error, an unknown name, or a result that is not a vector.
    """
    vector: WeightVector = _Evaluation(expression, vectors, WeightVector).result()
    return vector


def check_expression(expression: str, names: Collection[str]) -> None:
    """Check an expression over vectors of these names before they exist: its syntax, its names, its functions.

    Raises:
        SteerError: as `combine`. Whether layers and ranks are there is known when the vectors are.
    """
    _Evaluation(expression, dict.fromkeys(names, _AnyVector()), _AnyVector).result()


def derived_card(card: RunCard, expression: str, vectors: Mapping[str, WeightVector]) -> RunCard:
    """The card of an expression's result: its text, and the cards of what went in."""
    return replace(
        RunCard.now("vector", base_model=card.base_model, base_revision=card.base_revision),
        settings={"expression": expression, "vectors": {name: _short(vector.card) for name, vector in vectors.items()}},
        data_sha256={f"{n} {key}": value for n, v in vectors.items() for key, value in v.card.data_sha256.items()},
        measured=card.measured,
        held_out=card.held_out,
    )


def _short(card: RunCard) -> dict[str, Any]:
    """The card of what went in, without the texts that it keeps."""
    return asdict(replace(card, held_out=()))


class _AnyVector:
    """Stands for a vector that is not there yet: every operation that a vector has gives another."""

    def __add__(self, other: _AnyVector) -> _AnyVector:
        return self

    __sub__ = __add__

    def __mul__(self, scale: float) -> _AnyVector:
        return self

    def __getattr__(self, name: str) -> object:
        signature = inspect.signature(getattr(WeightVector, name))

        def method(*operands: object, **options: object) -> _AnyVector:
            signature.bind(self, *operands, **options)  # raises TypeError as the method would
            return self

        return method


Value = Any  # a vector of the evaluation's kind, or a float


class _Evaluation:
    """One expression over vectors of one kind: real ones, or stand-ins."""

    def __init__(self, text: str, vectors: Mapping[str, Any], kind: type[WeightVector] | type[_AnyVector]) -> None:
        self.text, self.vectors, self.kind = text, vectors, kind

    def result(self) -> Value:
        """The expression's value."""
        if len(self.text) > LONGEST:
            raise self._error(f"is longer than {LONGEST} characters; combine in several steps")
        try:
            value = self._value(ast.parse(self.text.strip(), mode="eval").body)
        except (SyntaxError, ValueError):  # ValueError: a NUL byte, a number of thousands of digits
            raise self._error("cannot be read; expected such as '0.8*honest - 0.5*rude'") from None
        except (RecursionError, MemoryError):
            raise self._error("is nested too deeply; combine in several steps") from None
        if not isinstance(value, self.kind):
            raise self._error("gives a number, expected a vector")
        return value

    def _error(self, reason: str) -> SteerError:
        return SteerError(f"expression {shown(self.text)}: {reason}")

    def _value(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return self._number(number)
            case ast.Name(id=name):
                return self._named(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._value(operand) * -1.0
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self._value(operand)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self._call(name, args, keywords)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(self._value(left), op, self._value(right))
        raise self._error(ALLOWED)

    def _number(self, number: float) -> float:
        """A factor, which float32 must hold."""
        if not abs(number) <= LARGEST_FLOAT:
            raise self._error(f"expected numbers up to {LARGEST_FLOAT:.3g}, found {shown(number)}")
        return float(number)

    def _named(self, name: str) -> Value:
        if name not in self.vectors:
            former = f"; {name} is called {FORMER_FUNCTIONS[name]} now" if name in FORMER_FUNCTIONS else ""
            raise self._error(f"unknown vector {name!r}; known: {', '.join(sorted(self.vectors)) or 'none'}{former}")
        return self.vectors[name]

    def _call(self, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Value:
        """A vector's method: vectors by position, options by name."""
        if name in FORMER_FUNCTIONS:
            raise self._error(f"{name} is called {FORMER_FUNCTIONS[name]} now; rename it")
        if name not in FUNCTIONS:
            raise self._error(f"{name} cannot be called so; expected {', '.join(FUNCTIONS)}; {ALLOWED}")
        expected = f"{name}({', '.join(['vector', *FUNCTIONS[name]])})"
        operands = [self._value(arg) for arg in args]
        if len(operands) != (2 if name in OF_TWO else 1) or not all(isinstance(v, self.kind) for v in operands):
            raise self._error(f"{name} cannot be called so; expected {expected}")
        options = {str(word.arg): self._option(word.value) for word in keywords}
        if not options.keys() <= set(FUNCTIONS[name]) or len(options) < len(keywords):
            raise self._error(f"options of {name}: {', '.join(FUNCTIONS[name]) or 'none'}; expected {expected}")
        try:
            return getattr(operands[0], name)(*operands[1:], **options)
        except TypeError:
            raise self._error(f"{name} misses an option or has one of the wrong kind; expected {expected}") from None

    def _option(self, node: ast.expr) -> object:
        """An option's value: a text or number as it stands, or what an expression gives."""
        return node.value if isinstance(node, ast.Constant) else self._value(node)

    def _binary(self, left: Value, op: ast.operator, right: Value) -> Value:
        vectors = isinstance(left, self.kind), isinstance(right, self.kind)
        match op, vectors:
            case ast.Add(), (True, True):
                return left + right
            case ast.Sub(), (True, True):
                return left - right
            case ast.Mult(), (False, False):
                return self._number(left * right)
            case ast.Mult(), (False, True):
                return right * left
            case ast.Mult(), (True, False):
                return left * right
            case ast.Div(), (_, False) if right != 0.0:
                return left * self._number(1.0 / right)
        raise self._error("vectors add and subtract, and are multiplied or divided by numbers")
