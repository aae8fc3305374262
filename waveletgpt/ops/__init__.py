"""The mixing operators and the backends that compute them.

`reference` is the definition. `cpp` (CPUs, compiled at installation) and `triton` (GPUs) read their input once;
`torch` is the fast path where neither is available. "auto" takes the fastest backend available here. Naming a backend
that is not available raises an error that says what is missing.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from waveletgpt.ops import autograd, cpp, fast, reference, triton
from waveletgpt.ops.reference import ahead, reach_of, reach_with_past

__all__ = [
    "ahead",
    "available_backends",
    "ema_mix",
    "reach_of",
    "reach_with_past",
    "unavailable_backends",
    "wavelet_mix",
]

autograd.KERNELS.update(triton=triton, cpp=cpp, torch=fast)
_FASTEST = {"cuda": "triton", "cpu": "cpp"}


def unavailable_backends() -> dict[str, str]:
    """Maps each backend that cannot be used here to what is missing."""
    reasons = {name: kernels.unavailable() for name, kernels in autograd.KERNELS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def available_backends() -> tuple[str, ...]:
    """The values of `backend` that work here, besides "auto"."""
    missing = unavailable_backends()
    return (*(name for name in autograd.KERNELS if name not in missing), "reference")


def wavelet_mix(
    x: Tensor,
    windows: Sequence[int],
    kernels: Iterable[Tensor] | None = None,
    *,
    edge: str = "zero",
    state: Tensor | None = None,
    reach: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    if state is not None and reach is None and edge == "zero" and backend == "auto":
        # Decoding adds one token at a time: try the fastest path first.
        kernels = None if kernels is None else list(kernels)
        one = cpp.newest(x, tuple(windows), kernels, state)
        if one is not None:
            return one
    chosen = _choose(backend, x)
    if chosen == "reference":
        return reference.wavelet_mix(x, windows, kernels, edge=edge, state=state, reach=reach)
    return autograd.wavelet_mix(x, windows, kernels, edge, state, chosen, reach)


def ema_mix(
    x: Tensor, decay: Tensor, *, state: Tensor | None = None, reach: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    chosen = _choose(backend, x)
    if chosen == "reference":
        return reference.ema_mix(x, decay, state=state, reach=reach)
    return autograd.ema_mix(x, decay, state, chosen, reach)


def _choose(backend: str, x: Tensor) -> str:
    """The backend to use for `x`. Raises ValueError, saying what is missing, if the named one cannot be used."""
    device = x.device.type if isinstance(x, Tensor) else "cpu"  # the backend refuses anything but a tensor
    if backend == "auto":
        fastest = _FASTEST.get(device, "torch")
        return "torch" if autograd.KERNELS[fastest].unavailable(device) else fastest
    if backend == "reference":
        return backend
    if backend not in autograd.KERNELS:
        raise ValueError(f"backend is {backend!r}: available here are {('auto', *available_backends())}")
    reason = autograd.KERNELS[backend].unavailable(device)
    if reason is not None:
        raise ValueError(f"backend is {backend!r}: {reason}")
    return backend


wavelet_mix.__doc__ = reference.wavelet_mix.__doc__
ema_mix.__doc__ = reference.ema_mix.__doc__
