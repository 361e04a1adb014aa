"""Real weights and real images for the benchmarks, out of package registries.

| function | gives |
| --- | --- |
| `emoji_images()` | a `Dataset`: emoji in three styles, English and Chinese labels (columns: `images.py`) |
| `animated_emoji()` | a `Dataset`: eight frames each (columns: `animated_emoji.py`) |
| `easy_vqa()` | a `Dataset`: questions about shapes (columns: `easy_vqa.py`) |
| `photos()` | a `Dataset`: cut-out photos and drawings with captions, by category (columns: `photos.py`) |
| `translation_pairs(language)` | a `Dataset`: texts in English and one of `LANGUAGES` (columns: `languages.py`) |
| `emoji_labels(language)` | the emoji's names in one of `LANGUAGES` |
| `dinov2_small()`, `minilm()`, `e5_small()` | folders of the pretrained towers: images, English, a hundred languages |
| `smollm2()` | the folder of a language model of 135M parameters |
| `captions(kind)`, `patch_states(kind)` | images as DINOv2-S sees them, and what is said of them (`captions.py`) |
| `caption_lm()` | the folder of a small language model that has read captions |
| `english_clip()` | the folder of the dual encoder assembled from them |
| `blip_retrieval()`, `blip_vqa()` | folders of the fusion models assembled from them, minutes of CPU each |

Everything is fetched, checked, converted and kept in the user cache on first use (`cache_dir()`); run
`python -m benchmarks.assets` to see what there is and `python -m benchmarks.assets NAME ...` to prepare it.
"""

from .animated_emoji import animated_emoji
from .blip_retrieval import blip_retrieval
from .blip_vqa import blip_vqa
from .caption_lm import caption_lm
from .captions import captions, patch_states
from .e5_small import e5_small
from .easy_vqa import easy_vqa
from .english_clip import english_clip
from .fetch import AssetError, cache_dir
from .images import emoji_images
from .languages import LANGUAGES, emoji_labels, translation_pairs
from .photos import photos
from .smollm2 import smollm2
from .towers import dinov2_small, minilm

__all__ = [
    "LANGUAGES",
    "AssetError",
    "animated_emoji",
    "blip_retrieval",
    "blip_vqa",
    "cache_dir",
    "caption_lm",
    "captions",
    "dinov2_small",
    "e5_small",
    "easy_vqa",
    "emoji_images",
    "emoji_labels",
    "english_clip",
    "minilm",
    "patch_states",
    "photos",
    "smollm2",
    "translation_pairs",
]
