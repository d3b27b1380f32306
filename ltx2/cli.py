"""The command line's entry point."""

import sys

from ltx2 import interrupt


def main() -> None:
    """Entry point of the `ltx2` script."""
    interrupt.expect()
    code = run(sys.argv[1:])
    interrupt.over()
    sys.exit(code)


def run(args: list[str]) -> int:
    """Run a command line and return its exit code."""
    from ltx2.commands.group import cli  # takes a while, in which Ctrl-C may come
    from ltx2.console import run_group

    return run_group(cli, args)
