"""Attention whose scores are not the dot product of a query and a key, one file each."""
