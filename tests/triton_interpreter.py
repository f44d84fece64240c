"""Triton's interpreter without what it does anew for every call of a function: half of its time (triton 3.7.1).

Its names are patched once for a kernel, not again for each function that the kernel calls; and a table of numpy's
dtypes is not built for each operation.
"""

import functools
from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter

_patch, _numpy_dtype = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)


def _patch_once(function: object) -> object:
    if not tl.core.is_builtin(tl.core.reshape):  # a kernel is running: the names are no longer triton's own
        return None
    return _patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


interpreter._patch_lang = _patch_once
interpreter._get_np_dtype = lambda dtype: _numpy_dtype(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)
