"""What a user's import path names: `file.py:name`, read anew after every edit, or `package.module:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from tokenloom.hints import suggest


def imported(path: str) -> Any:
    """The object that an import path names.

    Raises:
        ValueError: when there is no such file, module or name.
    """
    source, _, attribute = path.rpartition(":")
    if source.endswith(".py"):
        file = Path(source).expanduser().resolve()
        if not file.is_file():
            raise ValueError(f"{path!r}: there is no file {source!r} (looked in {Path.cwd()})")
        module = _import_file(file)
    elif not source:
        raise ValueError(f"{path!r} names no module; write 'file.py:function' or 'package.module:function'")
    else:
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise ValueError(f"{path!r}: cannot import {source!r}: {error}") from error
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise ValueError(f"{source!r} has no {attribute!r}{suggest(attribute, names)}")
    return getattr(module, attribute)


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles the file as it is now: bytecode caches go by whole seconds and would miss a quick edit."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _import_file(file: Path) -> types.ModuleType:
    """The module of a file under a name of its own, the same in every process; imported again after an edit."""
    module_name = f"tokenloom_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    known = sys.modules.get(module_name)
    if known is not None and known.__dict__["__content__"] == content:
        return known
    loader = _SourceLoader(module_name, str(file))
    spec = importlib.util.spec_from_file_location(module_name, file, loader=loader)
    if spec is None:
        raise ValueError(f"{str(file)!r} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__content__"] = content
    sys.modules[module_name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
