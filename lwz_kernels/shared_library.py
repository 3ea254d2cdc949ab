"""Finding and loading the shared libraries that the build puts beside this package."""

import ctypes
import importlib.util
from collections.abc import Callable

__all__ = ["load_shared_library"]


def load_shared_library(
    name: str,
    version_function: str,
    version: int,
    *,
    needs: str,
    prepare: Callable[[], None] = lambda: None,
) -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it is not there.

    Args:
        name: of the module that it would be, "lwz_kernels._native".
        version_function: of the library; returns the version of its interface.
        version: the one that the caller speaks.
        needs: what has to be done to get it built, for the reason.
        prepare: called before it is loaded; may raise OSError.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None, f"{name.replace('.', '/')}.so was not built: {needs}"
    try:
        prepare()
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"{spec.origin} does not load: {error}"
    found = getattr(library, version_function)()
    if found != version:
        return None, (
            f"{spec.origin} has interface version {found}, expected {version}: "
            "run pip install . again"
        )
    return library, ""
