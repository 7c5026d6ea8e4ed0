"""Decoder-only language models with exchangeable attention and position schemes."""
