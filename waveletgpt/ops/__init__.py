"""The mixing operators: `wavelet_mix`, `ema_mix`, and the backends that compute them."""

from waveletgpt.ops.dispatch import available_backends, ema_mix, wavelet_mix

__all__ = ["available_backends", "ema_mix", "wavelet_mix"]
