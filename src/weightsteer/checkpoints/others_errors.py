"""What other libraries raise while they read a model, as one line; without an import of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import SteerError, first_line

PANIC = "PanicException"  # of libraries in Rust; it is no Exception


@contextmanager
def read_by_others(name: str, what: str = "") -> Iterator[None]:
    """Turn whatever another library raises in the block into a `SteerError`.

    A damaged file makes transformers and tokenizers raise errors of any type, from wherever it is first used.

    Args:
        name: the model, for the message.
        what: what of it is read, such as "its tokenizer".
    """
    try:
        yield
    except SteerError as error:
        raise error if str(error).startswith(name) else SteerError(f"{name}: {error}") from None
    except Exception as error:
        raise SteerError(f"{name}: {what}cannot be loaded ({_reason(error)})") from None
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise SteerError(f"{name}: {what}cannot be loaded ({first_line(error)})") from None


def _reason(error: Exception) -> str:
    """An error in words; a bare name, as a KeyError has it, with its type."""
    text = first_line(error)
    if "Unrecognized configuration class" in text:
        return (
            "transformers does not load it as a language model; vectors of it are made, combined, merged and exported "
            "as of others, and in Python `vector.applied(model, k)` steers the model that you have loaded"
        )
    return text if len(text.split()) > 1 else f"{type(error).__name__}: {text}"
