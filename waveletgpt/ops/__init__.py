"""The mixing operators and the backends that compute them.

`reference` is the definition; `torch` is the fast path, on any device. A backend is a module with both operators.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from waveletgpt.ops import fast, reference

__all__ = ["available_backends", "ema_mix", "wavelet_mix"]

_BACKENDS = {"torch": fast, "reference": reference}  # the fastest first


def available_backends() -> tuple[str, ...]:
    """Names that `backend` takes here besides "auto", which is the first of them."""
    return tuple(_BACKENDS)


def wavelet_mix(
    x: Tensor,
    windows: Sequence[int],
    kernels: Iterable[Tensor] | None = None,
    *,
    edge: str = "zero",
    state: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    reference.check_backend(backend, available_backends())
    chosen = fast if backend == "auto" else _BACKENDS[backend]
    return chosen.wavelet_mix(x, windows, kernels, edge=edge, state=state)


def ema_mix(x: Tensor, decay: Tensor, *, state: Tensor | None = None, backend: str = "auto") -> Tensor:
    reference.check_backend(backend, available_backends())
    chosen = fast if backend == "auto" else _BACKENDS[backend]
    return chosen.ema_mix(x, decay, state=state)


wavelet_mix.__doc__ = reference.wavelet_mix.__doc__
ema_mix.__doc__ = reference.ema_mix.__doc__
