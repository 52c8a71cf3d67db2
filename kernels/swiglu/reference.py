"""swiglu in plain torch: the specification. Runs on any device, in bounded chunks of rows."""

import torch.nn.functional as F

from unmask.kernels.swiglu.call import SwigluCall

_ROWS = 4096


def swiglu(call: SwigluCall) -> None:
    for start in range(0, len(call.out), _ROWS):
        rows = slice(start, start + _ROWS)
        gate, up = call.gate_up[rows].float().chunk(2, dim=1)
        call.out[rows] = F.silu(gate) * up
