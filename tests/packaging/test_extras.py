"""Test that fastlm imports no library unasked, and names a missing or old library with the extra that installs it."""

from importlib import metadata

import pytest
from support.processes import printed, python

from fastlm.integrations import extras

LIBRARIES = ("diffusers", "opacus", "pythae", "transformers")


def test_importing_fastlm_imports_no_library():
    code = f"import sys, fastlm; print([name for name in {LIBRARIES!r} if name in sys.modules])"
    assert printed(code) == "[]"


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_library_is_named_with_its_extra(library, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match=rf"needs {library} >= [\d.]+, which is missing: pip install 'fastlm\[{library}\]'"):
        extras.require(library)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_too_old_is_named_with_its_extra(library, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.9")
    with pytest.raises(ImportError, match=rf"needs {library} >= [\d.]+; 0.0.9 is installed: pip install 'fastlm\[{library}\]'"):
        extras.require(library)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_integration_itself_asks(library):
    code = f"""
from importlib import metadata
metadata.version = lambda name: "0.0.1"
import fastlm.integrations.{library}
"""
    process = python(code)
    assert process.returncode != 0
    assert f"ImportError: fastlm.integrations.{library} needs {library} >= " in process.stderr


def test_versions_are_compared_as_numbers(monkeypatch):
    monkeypatch.setattr(extras, "_minimum", lambda library: "0.35")
    for version in ("0.35", "0.35.0", "0.35.0.dev0", "0.100.1", "1.0rc1", "0.35+cpu"):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        extras.require("diffusers")
    for version in ("0.34.9", "0.4", "0.3.5"):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        with pytest.raises(ImportError):
            extras.require("diffusers")
