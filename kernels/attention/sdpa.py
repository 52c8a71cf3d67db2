"""attention by torch's scaled_dot_product_attention: one call for every run of equally long sequences."""

import torch
import torch.nn.functional as F

from unmask.kernels.attention.call import AttentionCall
from unmask.kernels.offsets import Offsets


def refuses(call: AttentionCall) -> str | None:
    if call.query.dtype is torch.float64:
        return "needs float32, bfloat16 or float16, got float64"
    for name, counts in (("lengths", call.lengths), ("row_counts", call.row_counts)):
        if isinstance(counts, Offsets):
            return f"needs {name} known to the host, got offsets on {counts.starts.device}"
    return None


def attention(call: AttentionCall) -> None:
    grouped = call.query.shape[1] != call.key.shape[1]
    for span in call.spans():
        query, key, value = (x.transpose(1, 2) for x in call.rotated(span))
        causal = call.block == 1 and call.positions is None and query.shape[2] == key.shape[2]
        visible = None if causal else call.visible(span)
        mask = None if visible is None else visible[:, None]
        result = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=call.scale, enable_gqa=grouped
        )
        call.out[span.queries].unflatten(0, (span.num_sequences, -1)).copy_(result.transpose(1, 2))
