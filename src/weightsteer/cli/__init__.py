"""The command line: one short function a verb. Heavy imports happen inside the verbs."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..errors import SteerError
from ..former_names import OPTIONS as FORMER_OPTIONS
from ..former_names import VERBS as FORMER_VERBS
from ..ranks import is_first
from ..shown import be_quiet, one_line, say
from . import apply, build, detect, export, inspect, listing, packs, run, serve, serve_command, start, study
from .arguments import refuse_repeated, with_expression
from .overview import VerbsByUse
from .stopping import StoppedError, stopping_on_signals

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads slow shared cores

EXPORTS = ("peft", "adapters", "merged", "gguf-lora", "gguf")
LISTS = ("--vectors", "--controls")  # options that take several values

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
QUIET = ("--quiet", "-q")  # taken anywhere in a command, as it is of the program and not of a verb

app = typer.Typer(
    name="weightsteer",
    cls=VerbsByUse,
    context_settings=HELP_OPTIONS,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

VERBS_BY_USE: Mapping[str, Sequence[Callable[..., None]]] = {  # the headings of the overview, in its order
    "From start to end": (start.init, start.make, run.run, *study.VERBS, listing.list_names),
    "Use a vector": (*apply.VERBS, *serve.VERBS),
    "Look at vectors": (*inspect.VERBS, *detect.VERBS),
    "Make vectors": build.VERBS,
    "Share vectors": packs.VERBS,
    "Measure": (start.calibrate, run.measure, run.sweep, run.compare, run.report),
}
for use, verbs in VERBS_BY_USE.items():
    for verb in verbs:
        app.command(listing.NAMES.get(verb), rich_help_panel=use)(verb)
app.command("serve-command", rich_help_panel="Use a vector")(serve_command.serve_command)
app.add_typer(export.app, name="export", rich_help_panel="Use a vector")


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"weightsteer {__version__}")
        raise typer.Exit


@app.callback()
def overview(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option(*QUIET, help="No progress and no notes; errors and warnings stay.")] = False,
) -> None:
    """A dial on a language model's behaviour, by contrastive weight steering (arXiv 2511.05408)."""
    be_quiet(quiet)


def main() -> None:
    """Run the command line: a user's mistake is one line on stderr and exit code 1, never a traceback."""
    warnings.showwarning = _show_warning
    if not is_first():  # of several processes one speaks; the errors of all are told
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        warnings.simplefilter("ignore")
        sys.argv.insert(1, QUIET[0])
    code: object = 1
    with stopping_on_signals() as stopped:
        try:
            code = _run_verb()
        except StoppedError:
            pass
        except Exception:
            if not stopped:
                raise
    if stopped:
        code = _fail(str(stopped[0]), stopped[0].code)
    sys.exit(code if isinstance(code, int) else 0)


def _run_verb() -> object:
    """Run the verb that the arguments name; returns the exit code, if it is one."""
    try:
        refuse_former(sys.argv[1:])
        arguments = spread(with_expression(app, sys.argv[1:]))
        refuse_repeated(app, [argument for argument in arguments if argument not in QUIET])
        return app(args=quiet_first(arguments), prog_name="weightsteer", standalone_mode=False)
    except SteerError as error:
        return _fail(str(error))
    except typer.Abort:  # the end of what is typed in
        return _fail("stopped", 130)
    except BrokenPipeError:
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except Exception as error:
        # typer carries a click of its own whose usage errors it does not export; they format themselves
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # a bare `weightsteer`: the message is the help
            say(error.format_message())
            return 0
        return _fail(error.format_message())


def refuse_former(arguments: Sequence[str]) -> None:
    """Tell a user of an older version what a verb or an option is called now."""
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if verb in FORMER_VERBS:
        raise SteerError(f"{verb}: is called `weightsteer {FORMER_VERBS[verb]}` now")
    if verb == "export" and rest and not rest[0].startswith("-") and rest[0] not in EXPORTS:
        raise SteerError(f"export: expected one of {', '.join(EXPORTS)} first, as in `weightsteer export peft VECTOR`")
    for option in (argument.partition("=")[0] for argument in rest):
        if option in FORMER_OPTIONS.get(verb, {}):
            raise SteerError(f"{option}: is called {FORMER_OPTIONS[verb][option]} now")


def spread(arguments: Sequence[str]) -> list[str]:
    """`--vectors a b` as `--vectors a --vectors b`, the one form of a list that click's options take."""
    found: list[str] = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in LISTS else ""
            if not option:
                found.append(argument)
        else:
            found += [option, argument] if option else [argument]
    return found


def quiet_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with --quiet before the verb, wherever the user has put it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before, after = arguments[:end], arguments[end:]
    wanted = [argument for argument in before if argument in QUIET][:1]
    return [*wanted, *(argument for argument in before if argument not in QUIET), *after]


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"weightsteer: warning: {one_line(str(message))}", error=True)


def _fail(message: str, code: int = 1) -> int:
    say(f"weightsteer: {one_line(message)}", error=True)
    return code
