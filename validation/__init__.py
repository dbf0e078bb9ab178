"""Proofs. Shares no arithmetic with converters, so that it can catch them."""
