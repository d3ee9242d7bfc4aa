"""The program ``fastlm``, installed as the package `fastlm_cli`: `fastlm.cli`, started without torch.

Python runs fastlm/__init__.py before any module of `fastlm`, and that imports torch, which takes seconds. A help text and a
usage error need no torch. So this package stands beside `fastlm`, and puts fastlm/__init__.py off until a command runs.
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> int:
    """Run the command line and return its exit code."""
    spec = find_spec("fastlm")
    package = sys.modules["fastlm"] = module_from_spec(spec)  # its modules can be imported from here on

    from fastlm.cli import main

    return main(load_package=lambda: spec.loader.exec_module(package))
