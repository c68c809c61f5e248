"""Keys and values of the tokens so far, kept for those to come."""

from attn_numba.caches.cache import KVCache, PagedKVCache

__all__ = ["KVCache", "PagedKVCache"]
