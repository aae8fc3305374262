"""first version"""
import torch
from torch import Tensor
from . import reference

def _steps(s, groups, reverse):
    # s (B,T,C) acc dtype, sorted windows. returns mean
    T = s.shape[1]
    out = torch.empty_like(s)
    start = 0
    d = 1
    cur = s
    for w, at, _ in groups:
        n = len(at)
        off = start
        while d < w and d < T:
            new = torch.empty(s.shape[0], T, s.shape[2]-start, dtype=s.dtype, device=s.device)
            if reverse:
                torch.add(cur[:, :-d], cur[:, d:], out=new[:, :-d]); new[:, -d:] = cur[:, -d:]
            else:
                torch.add(cur[:, d:], cur[:, :-d], out=new[:, d:]); new[:, :d] = cur[:, :d]
            cur = new
            d *= 2
        torch.mul(cur[..., :n], 1/w, out=out[..., start:start+n])
        start += n
        cur = cur[..., n:]
    return out

def _mean(x, windows, reverse):
    groups = reference.check_wavelet_mix(x, windows, None, "zero", None)
    order = [c for _, at, _ in groups for c in at]
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    if order != list(range(len(order))):
        s = s[..., order]
    y = _steps(s, groups, reverse)
    if order != list(range(len(order))):
        y = y[..., sorted(range(len(order)), key=order.__getitem__)]
    return y.to(x.dtype)

@torch.library.custom_op("waveletgpt::mean", mutates_args=())
def mean_op(x: Tensor, windows: list[int], reverse: bool) -> Tensor:
    return _mean(x, windows, reverse)
@mean_op.register_fake
def _(x, windows, reverse):
    return x.new_empty(x.shape)
mean_op.register_autograd(lambda ctx, g: (mean_op(g, ctx.w, not ctx.r), None, None),
    setup_context=lambda ctx, inputs, output: (setattr(ctx, "w", inputs[1]), setattr(ctx, "r", inputs[2])))

def wavelet_mix(x, windows, kernels=None, *, edge="zero", state=None):
    if kernels is not None:
        return reference.wavelet_mix(x, windows, kernels, edge=edge, state=state)
    reference.check_wavelet_mix(x, windows, None, edge, state)
    s = x
    T = x.shape[1]
    if state is not None:
        s = torch.cat((state.to(x.dtype), x), 1)
    y = mean_op(s, list(windows), False)[:, -T:]
    if edge == "partial":
        n = torch.arange(s.shape[1]-T+1, s.shape[1]+1, device=x.device)[:, None]
        w = torch.tensor(list(windows), device=x.device)
        y = y * (w / torch.minimum(n, w)).to(x.dtype)
    return y

def ema_mix(x, decay, *, state=None):
    return_dtype = x.dtype
    reference.check_ema_mix(x, decay, state)
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    a = decay.to(s.dtype)
    s = (1 - a) * s
    T = x.shape[1]
    if state is not None:
        s = torch.cat((s[:, :1] + (a * state.to(s.dtype))[:, None], s[:, 1:]), 1)
    d = 1
    p = a
    while d < T:
        s = torch.cat((s[:, :d], torch.addcmul(s[:, d:], p, s[:, :-d])), 1)
        p = p * p
        d *= 2
    return s.to(return_dtype)
