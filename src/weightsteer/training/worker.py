"""One of several processes that make a fine-tune together: `python -m weightsteer.training.worker FOLDER`.

`launch` starts it by `torch.distributed.run`. By hand, `torchrun -m weightsteer train` does the same work.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from ..errors import SteerError
from ..example_files.load import load_examples, load_pairs
from ..files import write_json
from ..locks import held_by_caller
from ..progress import Progress, silent
from ..ranks import is_first, rank
from ..shown import say
from .job import without_gain
from .launch import DATA, DONE, ORDER
from .order import Order, load_together
from .preference import Preference, prefer_held
from .sft import train_held

SECONDS = 0.5  # between two looks whether the caller is still there


def main() -> None:
    """Carry out the order in a folder, together with the other processes."""
    folder = Path(sys.argv[1])
    order = Order.load(folder / ORDER)
    _end_with(order.parent)
    told: list[str] = []
    warnings.showwarning = lambda message, *_, **__: told.append(str(message))
    try:
        carry_out(order, folder / DATA, _reporting(folder / DONE) if is_first() else silent)
    except SteerError as error:
        write_json(folder / f"refused-{rank()}.json", str(error))
        sys.exit(1)
    except Exception:
        say(traceback.format_exc(), error=True, flush=True)
        os._exit(1)  # without waiting for the other processes, which wait for this one
    finally:
        if is_first():
            write_json(folder / "warnings.json", told)


def carry_out(order: Order, data: Path, progress: Progress) -> Path:
    """Make the fine-tune of an order in this process and those beside it.

    Raises:
        SteerError: the model is another one by now, or what the training refuses.
    """
    settings = order.settings
    lm = load_together(order.asked(), shard=settings.shard)
    if lm.revision != order.revision:
        raise SteerError(f"{lm.name}: has changed since it was loaded; run the same command again")
    lm = replace(lm, system_prompt=order.system_prompt)
    out = Path(order.out)
    with held_by_caller(out), without_gain() if order.any_outcome else nullcontext():
        if order.beta is None:
            return train_held(lm, load_examples(data), out, settings, progress)
        wanted = [Preference(pair.prompt, pair.positive, pair.negative) for pair in load_pairs(data)]
        return prefer_held(lm, wanted, out, settings, order.beta, progress)


def _reporting(path: Path) -> Progress:
    """Progress for the caller, who looks at a file now and then."""
    told = 0.0

    def report(done: float, total: float, note: str = "") -> None:
        nonlocal told
        if time.monotonic() - told >= SECONDS or done >= total:
            write_json(path, [done, total, note])
            told = time.monotonic()

    return report


def _end_with(parent: int) -> None:
    """End this process when the one that has asked for it, or the one that has started it, is gone."""
    agent = os.getppid()

    def watch() -> None:
        while _lives(parent) and os.getppid() == agent:
            time.sleep(SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


if __name__ == "__main__":
    main()
