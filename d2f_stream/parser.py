"""Parser: how each command of the project takes its arguments, and answers those that it cannot.

An argparse parser whose mistakes are told in one sentence, with the name that was probably meant,
and whose help shows the defaults and an example. Used by every package's commands.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final, NoReturn

from d2f_stream.core.nearest import did_you_mean, one_of

__all__ = ["Parser", "add_command", "new_parser"]

BAD_INPUT: Final = 2
NUMBERS: Final[dict[Any, str]] = {int: "a whole number", float: "a number"}


class HelpText(argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one worth telling."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help or ""
        if isinstance(action, argparse.BooleanOptionalAction):
            told = told.removesuffix(" (default: %(default)s)")  # as some Pythons have it
            return f"{told} (default: {'on' if action.default else 'off'})"
        if action.default in (None, False, True, 0.0, "", argparse.SUPPRESS) or "default" in told:
            return told
        return f"{told} (default: %(default)s)" if action.default else told


class Parser(argparse.ArgumentParser):
    """Parses the arguments of one command; a wrong one ends the program with status 2."""

    def parse_known_args(  # type: ignore[override]  # nobody here goes on with unknown ones
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse all arguments: one that is not known is an error, even of a subcommand."""
        given = list(sys.argv[1:] if args is None else args)
        for option in self._options_in(given):
            self._check_option(option)
        found, rest = super().parse_known_args(given, namespace)
        if rest and rest[0].startswith("-"):
            self._check_option(rest[0])
        if rest:
            self.error(f"there is no place for {rest[0]!r}; a text with spaces needs quotes")
        return found, []

    def error(self, message: str) -> NoReturn:
        """End the program with how the command is used, in a line, and what is wrong."""
        words = ["[options]", *map(_name, self._get_positional_actions())]
        usage = f"usage: {self.prog} {' '.join(words)}   (--help explains)"
        self.exit(BAD_INPUT, f"{usage}\n{self.prog}: error: {message}\n")

    def _options_in(self, given: Sequence[str]) -> Iterator[str]:
        """Yield what looks like an option and belongs to this command, without its value."""
        has_commands = any(isinstance(a, argparse._SubParsersAction) for a in self._actions)
        for text in given:
            if text == "--" or (has_commands and not text.startswith("-")):
                return
            option = text.partition("=")[0]
            if option.startswith("--") and " " not in option:
                yield option

    def _check_option(self, option: str) -> None:
        known = self._option_string_actions
        if not any(name.startswith(option) for name in known):  # argparse takes beginnings
            hint = did_you_mean(option, known) or f"{self.prog} --help lists the options"
            self.error(f"there is no option {option}; {hint}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if action.type not in NUMBERS:
                raise
            must = f"must be {NUMBERS[action.type]}"
            self.error(f"{_told(action)} is {arg_string!r} but {must}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = list(map(str, action.choices))
        if isinstance(action, argparse._SubParsersAction):
            hint = did_you_mean(value, choices) or f"{self.prog} --help lists the commands"
            self.error(f"there is no command {value!r}; {hint}")
        self.error(f"{_told(action)} is {value!r} but must be {one_of(str(value), choices)}")


def new_parser(prog: str, description: str, *, example: str, more: str = "") -> Parser:
    """Return a parser.

    Args:
        prog: what people type to run the command.
        description: a sentence.
        example: a command line that works.
        more: to be read below the options.
    """
    epilog = f"{more.rstrip()}\n\nexample: {example}".lstrip()
    return Parser(prog=prog, description=description, epilog=epilog, formatter_class=HelpText)


def add_command(
    commands: "argparse._SubParsersAction[Parser]",
    name: str,
    text: str,
    *,
    example: str,
    more: str = "",
) -> Parser:
    """Add a subcommand and return its parser; what it does stands in its list and in its help."""
    made = new_parser("", f"{text[0].upper()}{text[1:]}.", example=example, more=more)
    return commands.add_parser(
        name, help=text, description=made.description, epilog=made.epilog,
        formatter_class=HelpText,
    )  # fmt: skip


def _told(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or _name(action)


def _name(action: argparse.Action) -> str:
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return f"[{name}]" if action.nargs in ("?", "*") else name
