"""What the commands of ``fastlm lm`` have in common."""

import argparse
from collections.abc import Callable


def command(
    commands: argparse._SubParsersAction,
    run: Callable[[argparse.Namespace], None],
    name: str,
    help: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A command without arguments yet, whose description and examples are shown as they are written."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=help, description=description, epilog=examples, formatter_class=shape)
    parser.set_defaults(run=run)
    return parser
