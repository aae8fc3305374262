from waveletgpt.ops import fast, reference

_BACKENDS = {"torch": fast, "reference": reference}

def available_backends():
    return tuple(_BACKENDS)

def wavelet_mix(x, windows, kernels=None, *, edge="zero", state=None, backend="auto"):
    reference.check_backend(backend, available_backends())
    module = _BACKENDS["torch" if backend == "auto" else backend]
    return module.wavelet_mix(x, windows, kernels, edge=edge, state=state)

def ema_mix(x, decay, *, state=None, backend="auto"):
    reference.check_backend(backend, available_backends())
    module = _BACKENDS["torch" if backend == "auto" else backend]
    return module.ema_mix(x, decay, state=state)
