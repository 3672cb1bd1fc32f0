"""Users' own functions and classes: `package.module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

FORMS = "`package.module:name` or `path/to/file.py:name`"


def split_target(target: str) -> tuple[str, str]:
    """Module (or file) and attribute name.

    The last colon separates them, so that a Windows drive letter stays with its path.

    Raises:
        ValueError: when the form is wrong or the file does not exist.
    """
    module, colon, name = target.rpartition(":")
    if not colon or not module.strip() or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{target!r} is not an import path; write {FORMS}")
    if module.endswith(".py"):
        if not Path(module).is_file():
            raise ValueError(f"{target!r}: there is no file {module!r} (looked from {Path.cwd()})")
    elif not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{target!r}: {module!r} is neither a module name nor a path ending in .py; write {FORMS}")
    return module, name


def import_target(target: str) -> Any:
    """The object that an import path names; modules of the working directory are found too.

    Raises:
        ValueError: when the form is wrong, or the module has no such name.
        Exception: whatever the module raises while it is imported.
    """
    source, name = split_target(target)
    module = _module_of_file(Path(source)) if source.endswith(".py") else _module_named(source)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            from tokenloom.tasks.names import unknown

            public = [known for known in vars(module) if not known.startswith("_")]
            raise ValueError(f"{target!r}: " + unknown(f"name in {source}", part, public))
        found = getattr(found, part)
    return found


def _module_named(name: str) -> ModuleType:
    # A console script does not have the working directory on its path, `python -m` does: make both alike.
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    return importlib.import_module(name)


def _module_of_file(path: Path) -> ModuleType:
    resolved = path.resolve()
    # Keyed by the whole path: two files of one name in different folders are different modules.
    name = f"tokenloom_user_{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution, as dataclasses and pickling inside the file expect
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
