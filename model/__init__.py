"""Decoder-only language models whose attention and positions are parts to choose."""
