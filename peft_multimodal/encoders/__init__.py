"""Frozen encoders that an adapter brings along: named, loaded, shared among adapters, checked."""
