"""Replaces functions of a live object, and puts back exactly what was there."""

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from types import MethodType, ModuleType
from typing import Any

_RECORD = "_unmask_replaced"  # beside the replaced functions: name -> what the object itself held there before
_ABSENT = "absent"  # the object itself held nothing: its class or module answered


def replace(obj: Any, functions: Mapping[str, Callable]) -> None:
    """Set `functions` on `obj`: of a module they become its functions, of any other object its methods.

    The object's class is left as it is. Raises ValueError if `obj` is patched already, TypeError if it has no
    attributes of its own or lacks one of the functions.
    """
    if not hasattr(obj, "__dict__") or isinstance(obj, type):
        raise TypeError(f"obj must be a live object or a module, got {named(obj)}")
    if is_patched(obj):
        raise ValueError(f"obj must not be patched already, got {named(obj)} with {_list(vars(obj)[_RECORD])} replaced")
    missing = [name for name in functions if not hasattr(obj, name)]
    if missing:
        raise TypeError(f"obj must have {_list(functions)}, got {named(obj)} without {_list(missing)}")
    own = vars(obj)
    own[_RECORD] = {name: own.get(name, _ABSENT) for name in functions}
    for name, function in functions.items():
        own[name] = function if isinstance(obj, ModuleType) else MethodType(function, obj)


def restore(obj: Any) -> None:
    """Undo `replace`. Raises ValueError if `obj` is not patched."""
    if not is_patched(obj):
        raise ValueError(f"obj must be patched, got {named(obj)} that is not")
    own = vars(obj)
    for name, before in own.pop(_RECORD).items():
        if before is _ABSENT:
            del own[name]
        else:
            own[name] = before


def is_patched(obj: Any) -> bool:
    return _RECORD in getattr(obj, "__dict__", {})


def has(obj: Any, *names: str) -> bool:
    """Whether `obj` has all of these functions."""
    return all(callable(getattr(obj, name, None)) for name in names)


def named(obj: Any) -> str:
    """An object in an error's words: "a Diffusion", "module 'sampling'"."""
    if isinstance(obj, ModuleType):
        return f"module {obj.__name__!r}"
    return f"class {obj.__name__}" if isinstance(obj, type) else f"a {type(obj).__name__}"


class SlowPathWarning(UserWarning):
    """A call is served right, but by a path that computes more than it needs; the message says why."""


@cache
def warn_once(message: str) -> None:
    """A `SlowPathWarning` that a process gives once."""
    warnings.warn(message, SlowPathWarning, stacklevel=3)


def _list(names: Mapping[str, Any] | list[str]) -> str:
    return ", ".join(names)
