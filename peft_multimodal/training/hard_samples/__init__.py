"""A memory of how hard each pair of a data set is, for training that visits hard pairs more often.

With s_ij = cos(v_i, t_j) / tau over the K latest pairs of a queue (the batch among them), from which every pair with i's
image or text is taken out, a pair's difficulty in one visit is one of

    "prob"     1 - p_i,                p_i = (softmax_j(s_ij)_i + softmax_j(s_ji)_i) / 2
    "margin"   sigmoid((m_0 - g_i) / T),   g_i = (2 s_ii - max_j s_ij - max_j s_ji) tau / 2
    "loss"     l_i / log(1 + n_i),     l_i = -(log softmax_j(s_ij)_i + log softmax_j(s_ji)_i) / 2,  n_i its negatives

The negatives are as many whatever the batch size, so that visits can be compared. The bank starts from what the
unadapted model finds hard (DAMO's talk on narrow domains) and follows by d_i <- mu d_i + (1 - mu) difficulty. With the
emphasis e_i, d_i itself ("power") or the share of pairs that are easier ("rank"),

    q_i = (e_i + eps)^alpha         what the sampler draws by (see `draws`)
    w_i = clip(x_i / mean(x), 1/4, 4), of mean 1 in the batch,   x_i = (e_i + eps)^gamma
    c_i = (N P(i))^-beta / max of the batch
    L   = sum_i w_i c_i l_i / B     w and c without gradient

"rank" is the default: 1 - p is near 1 for most pairs of a narrow domain, and powers of it hardly differ.
"""

from ...rows import hash_ids
from .bank import FILE, HardSampleBank, load_arrays, save_arrays
from .difficulty import FeatureQueue, HardSampling, difficulties
from .keys import SampleIds, default_collator, read_ids, split_keys, stack_rows, unique_keys
from .sampler import HardSampleSampler

__all__ = [
    "FILE",
    "FeatureQueue",
    "HardSampleBank",
    "HardSampleSampler",
    "HardSampling",
    "SampleIds",
    "default_collator",
    "difficulties",
    "hash_ids",
    "load_arrays",
    "read_ids",
    "save_arrays",
    "split_keys",
    "stack_rows",
    "unique_keys",
]
