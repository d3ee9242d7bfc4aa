"""The common shape of the commands of ``fastlm lm``."""

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
    """Add a command without arguments, whose help shows the description and the examples with their line breaks."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=help, description=description, epilog=examples, formatter_class=shape)
    parser.set_defaults(run=run)
    return parser
