"""Objects on their way to another process, also when their classes stand in a file that it cannot import by name."""

import importlib
import importlib.util
import io
import pickle
import sys
from pathlib import Path
from types import FunctionType
from typing import Any


def pack(content: Any) -> bytes:
    """Pickle an object, and note in which files its classes and functions stand."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    modules = {name: sys.modules[name] for name in pickler.modules - {"__main__"} if name in sys.modules}
    files = {name: path for name, module in modules.items() if (path := getattr(module, "__file__", None))}
    return pickle.dumps((files, buffer.getvalue()))


def unpack(parcel: bytes) -> Any:
    """Make the object again; modules that cannot be imported by name are loaded from their files."""
    files, content = pickle.loads(parcel)
    for name, path in files.items():
        _load(name, path)
    return pickle.loads(content)


class _Pickler(pickle.Pickler):
    """Remembers the modules of the classes and functions that it meets."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.modules: set[str] = set()

    def reducer_override(self, content: Any) -> Any:
        if isinstance(content, type | FunctionType):
            self.modules.add(content.__module__)
        return NotImplemented


def _load(name: str, path: str) -> None:
    if name in sys.modules:
        return
    try:
        importlib.import_module(name)
    except ImportError:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(Path(path).parent))  # for what lies beside it
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.remove(str(Path(path).parent))
