"""Losses of image-text retrieval as pure functions: contrastive (ITC), matching (ITM), hard negatives, and their sum.

ITC, for unit embeddings v_i, t_j of B pairs, scale s = 1 / temperature, and N(i) the rows that aren't i's match:

    L = -1/2B Σ_i [log e^{s v_i·t_i} / (e^{s v_i·t_i} + Σ_{j∈N(i)} e^{s v_i·t_j}) + the same with v and t exchanged]

(CLIP, Radford et al. 2021). Models like SigLIP (Zhai et al. 2023) were trained by the sigmoid loss instead, which looks at
each image and text alone, with a bias beta beside the scale:

    L = -1/B Σ_i Σ_{j = i or j∈N(i)} log σ(y_ij (s v_i·t_j + beta)),   y_ij = 1 if i = j, else -1

ITM is the cross-entropy of a two-class head on fused pairs, against negatives sampled in proportion to e^{s v_i·t_j}
(ALBEF, Li et al. 2021; BLIP, Li et al. 2022).
"""

from .contrastive import LOGIT_SCALE, contrastive_loss, contrastive_loss_func, pair_losses, similarity_loss
from .embeddings import dual_embeddings, text_keys
from .matching import hard_negative_indices, matching_loss, retrieval_embeddings, retrieval_loss
from .sigmoid import CHUNK, sigmoid_loss, sigmoid_pair_losses

__all__ = [
    "CHUNK",
    "LOGIT_SCALE",
    "contrastive_loss",
    "contrastive_loss_func",
    "dual_embeddings",
    "hard_negative_indices",
    "matching_loss",
    "pair_losses",
    "retrieval_embeddings",
    "retrieval_loss",
    "sigmoid_loss",
    "sigmoid_pair_losses",
    "similarity_loss",
    "text_keys",
]
