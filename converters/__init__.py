"""Adapter -> Adapter, as pure functions."""
