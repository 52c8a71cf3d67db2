"""attention in plain torch: the specification. Runs on any device, a head of a sequence at a time.

It waits for a GPU where sequences begin at offsets.
"""

import math

import torch

from unmask.kernels.attention.call import AttentionCall


def attention(call: AttentionCall) -> None:
    call = call.counted()
    share = call.query.shape[1] // call.key.shape[1]
    wide = torch.promote_types(call.query.dtype, torch.float32)
    for span in call.spans():
        out = call.out[span.queries].unflatten(0, (span.num_sequences, -1))
        query, key, value = (x.to(wide) for x in call.rotated(span))
        visible = call.visible(span)
        for sequence in range(span.num_sequences):
            for head in range(query.shape[2]):
                scores = query[sequence, :, head] @ key[sequence, :, head // share].T * call.scale
                if visible is not None:
                    scores.masked_fill_(~visible[sequence % len(visible)], -math.inf)
                out[sequence, :, head] = (scores.softmax(dim=1) @ value[sequence, :, head // share]).to(out.dtype)
