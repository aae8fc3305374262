"""Backend "cpp": the kernels of kernels.cpp, on CPUs.

Installing the package compiles them if it finds GCC or Clang with OpenMP. Otherwise this backend is unavailable, and
"auto" takes "torch". Results do not depend on the number of threads (`torch.set_num_threads`). In float32 and float64,
means equal those of "torch" bit for bit.

Shapes: B batch, T tokens, C mixed channels.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_int, c_int64, c_void_p
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from waveletgpt.ops import fast
from waveletgpt.ops.autograd import Windows, empty_result, tap_offsets
from waveletgpt.ops.reference import UNLIMITED

# Kernels with more taps go through the FFT of "torch". Measured on one core with AVX-512.
DIRECT_TAPS = 1024
# The version of kernels.cpp that the calls below expect.
VERSION = 4


class _Input(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("row", c_int64), ("step", c_int64))


class _Shape(ctypes.Structure):
    _fields_ = (("batch", c_int64), ("tokens", c_int64), ("channels", c_int64))


class _Newest(ctypes.Structure):
    _fields_ = (
        *(("x", c_void_p), ("y", c_void_p), ("batch", c_int64), ("channels", c_int64), ("width", c_int64)),
        *(("past", c_void_p), ("tokens", c_int64), ("row", c_int64), ("step", c_int64)),
    )


class _Group(ctypes.Structure):
    _fields_ = (("size", c_int64), ("window", c_int64), ("taps", c_void_p), ("stride", c_int64))


class _Windows(ctypes.Structure):
    _fields_ = (("windows", c_void_p), ("offsets", c_void_p))


class _Reach(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("row", c_int64))


_SIGNATURES = {
    "mean": (_Input, c_void_p, _Shape, c_void_p, _Reach, c_bool, c_int64, c_int),
    "filter": (_Input, c_void_p, _Shape, _Windows, c_void_p, _Reach, c_bool, c_int64, c_int),
    "correlate": (_Input, _Input, _Shape, _Windows, _Reach, c_int64, c_void_p, c_int),
    "decayed_sum": (_Input, c_void_p, _Shape, c_void_p, c_bool, c_int),
}


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled library and None, or None and why it cannot be used."""
    for path in (Path(__file__).with_name("_kernels" + suffix) for suffix in EXTENSION_SUFFIXES):
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
            if library.waveletgpt_version() != VERSION:
                return None, f"{path.name} is of another version; install the package again"
        except (AttributeError, OSError) as error:
            return None, f"{path.name} does not load ({error}); install the package again"
        return library, None
    return None, "kernels.cpp was not compiled; install the package again where g++ or clang++ with OpenMP is found"


_LIBRARY, _REASON = _load()
if _LIBRARY is not None:
    _newest = _LIBRARY.waveletgpt_newest
    _newest.argtypes, _newest.restype = (_Newest, ctypes.POINTER(_Group), c_int64), None


def unavailable(device: str | None = None) -> str | None:
    """Why this backend cannot be used here (for tensors on `device`); None if it can."""
    if _LIBRARY is None or device in (None, "cpu"):
        return _REASON
    return f"x is on {device}, this backend is for CPUs"


@lru_cache(maxsize=64)
def _entry(name: str, dtype: torch.dtype) -> Callable[..., None]:
    entry = getattr(_LIBRARY, f"waveletgpt_{name}_{str(dtype).removeprefix('torch.')}")
    entry.argtypes, entry.restype = _SIGNATURES[name], None
    result: Callable[..., None] = entry
    return result


def mean(x: Tensor, windows: Windows, reverse: bool, past: int, reach: Tensor | None = None) -> Tensor:
    x, dtype, reach = _prepare(x), x.dtype, _numbers(reach)
    y = empty_result(x, past)
    sizes = _sizes(windows, torch.promote_types(dtype, torch.float32)).data_ptr()
    arguments = (_input(x), y.data_ptr(), _Shape(*x.shape), sizes, _reach(reach), reverse, past)
    _entry("mean", x.dtype)(*arguments, _threads(x))
    return y.to(dtype)


def filter(x: Tensor, windows: Windows, taps: Tensor, past: int, reach: Tensor | None = None) -> Tensor:
    if min(max(windows), x.shape[1]) > DIRECT_TAPS:
        return fast.filter(x, windows, taps, past, reach)
    return _filter(x, windows, taps, False, past, reach)


def filter_backward(
    grad: Tensor, x: Tensor, windows: Windows, taps: Tensor, reach: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    longest = max(windows)
    if min(longest, x.shape[1]) > DIRECT_TAPS:
        return fast.filter_backward(grad, x, windows, taps, reach)
    grad_x = _filter(grad, windows, taps, True, 0, reach)
    grad_taps, reach = torch.empty_like(taps), _numbers(reach)
    grad, signal = _prepare(grad), _prepare(x)
    arguments = (_input(grad), _input(signal), _Shape(*x.shape), _layout(windows)[0], _reach(reach), longest)
    _entry("correlate", signal.dtype)(*arguments, grad_taps.data_ptr(), _threads(x))
    return grad_x, grad_taps


def decayed_sum(u: Tensor, a: Tensor, reverse: bool, keep: Tensor | None = None) -> Tensor:
    if keep is not None:
        return fast.decayed_sum(u, a, reverse, keep)
    u, a = _prepare(u), a.contiguous()
    y = empty_result(u)
    arguments = (_input(u), y.data_ptr(), _Shape(*u.shape), a.data_ptr(), reverse)
    _entry("decayed_sum", u.dtype)(*arguments, _threads(u))
    return y


def newest(x: Tensor, windows: Windows, kernels: Sequence[Tensor] | None, state: Tensor) -> Tensor | None:
    """`wavelet_mix` for decoding, in one call: one token x (B, 1, C) after the tokens in `state` (B, S, C).

    None if these kernels do not support the arguments or one is wrong: `wavelet_mix` then computes it, or raises.
    """
    # Called for every token at every site, so microseconds count.
    if _LIBRARY is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not isinstance(x, Tensor) or not isinstance(state, Tensor):
        return None
    shape, before = x.shape, state.shape
    if len(shape) != 3 or len(before) != 3 or shape[1] != 1 or shape[::2] != before[::2] or len(windows) != shape[2]:
        return None
    if not _float32(x) or not _float32(state):
        return None
    groups = _groups(windows, kernels is None)
    if groups is None:
        return None
    taps, shared = None, False
    if kernels is not None:
        if len(kernels) != len(groups) or not all(isinstance(h, Tensor) for h in kernels):
            return None
        shared = kernels[0].ndim == 1
        for h, (w, n) in zip(kernels, groups, strict=True):
            if h.shape != ((w,) if shared else (n, w)) or not _float32(h) or not h.is_contiguous():
                return None
        taps = tuple([h.data_ptr() for h in kernels])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    row, step, _ = state.stride()
    token = _Newest(x.data_ptr(), y.data_ptr(), shape[0], shape[2], x.stride(0), state.data_ptr(), before[1], row, step)
    _newest(token, _describe(groups, taps, shared), len(groups))
    return y


def _float32(x: Tensor) -> bool:
    """Whether x is float32, on the CPU, and contiguous in its last dimension."""
    return x.is_cpu and x.dtype is torch.float32 and (x.stride(-1) == 1 or x.shape[-1] == 1)


def _groups(windows: Windows, dyadic: bool) -> tuple[tuple[int, int], ...] | None:
    """(window, number of channels) of each group. None if the windows do not ascend, one is no integer from 1 on, or
    `dyadic` and one is not a power of two.

    What it found is kept for the tuple itself, not for its value: that takes longer to look up, and 2.0 would be 2.
    """
    known = _GROUPS.get((id(windows), dyadic))
    if known is not None and known[0] is windows:
        return known[1]
    groups = None
    whole = all(type(w) is int and w >= 1 and not (dyadic and w & (w - 1)) for w in windows)
    if whole and list(windows) == sorted(windows):
        groups = tuple((w, len(list(channels))) for w, channels in groupby(windows))
    if len(_GROUPS) >= 256:
        _GROUPS.clear()
    _GROUPS[id(windows), dyadic] = windows, groups
    return groups


_GROUPS: dict[tuple[int, bool], tuple[Windows, tuple[tuple[int, int], ...] | None]] = {}


@lru_cache(maxsize=256)
def _describe(
    groups: tuple[tuple[int, int], ...], taps: tuple[int, ...] | None, shared: bool
) -> "ctypes.Array[_Group]":
    pointers = (None,) * len(groups) if taps is None else taps
    described = [_Group(n, w, h, 0 if shared else w) for (w, n), h in zip(groups, pointers, strict=True)]
    return (_Group * len(described))(*described)


def _filter(x: Tensor, windows: Windows, taps: Tensor, reverse: bool, past: int, reach: Tensor | None) -> Tensor:
    x, taps, dtype, reach = _prepare(x), taps.contiguous(), x.dtype, _numbers(reach)
    y = empty_result(x, past)
    arguments = (_input(x), y.data_ptr(), _Shape(*x.shape), _layout(windows)[0], taps.data_ptr(), _reach(reach))
    _entry("filter", x.dtype)(*arguments, reverse, past, _threads(x))
    return y.to(dtype)


def _prepare(x: Tensor) -> Tensor:
    """x as the kernels take it: contiguous in its last dimension, float16 as float32."""
    x = x.float() if x.dtype == torch.float16 else x
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _numbers(reach: Tensor | None) -> Tensor | None:
    """`reach` as the kernels take it. Keep the result alive while they run."""
    if reach is None:
        return None
    return (reach if reach.dtype == torch.int32 else reach.clamp(max=UNLIMITED).int()).contiguous()


def _reach(reach: Tensor | None) -> _Reach:
    """`reach` as a C structure, with a row for each sequence or one row for all."""
    return _Reach(None, 0) if reach is None else _Reach(reach.data_ptr(), reach.shape[1] if len(reach) > 1 else 0)


def _threads(x: Tensor) -> int:
    """One thread for small x: waking the others takes as long as mixing a few thousand elements."""
    return torch.get_num_threads() if x.numel() > 1 << 14 else 1


def _input(x: Tensor) -> _Input:
    return _Input(x.data_ptr(), x.stride(0), x.stride(1))


@lru_cache(maxsize=256)
def _sizes(windows: Windows, dtype: torch.dtype) -> Tensor:
    return torch.tensor(windows, dtype=dtype, device="cpu")


@lru_cache(maxsize=256)
def _layout(windows: Windows) -> tuple[_Windows, Tensor]:
    """The windows and where the taps of each begin, as a C structure, and the tensor that holds both."""
    both = torch.tensor([windows, tap_offsets(windows)], dtype=torch.int64, device="cpu")
    return _Windows(both[0].data_ptr(), both[1].data_ptr()), both
