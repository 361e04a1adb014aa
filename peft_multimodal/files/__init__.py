"""Adapters as files: saved aside and renamed, checked before they are loaded, published with a card."""
