"""Benchmarks. Their threads wait as those of the commands do."""

import cli  # noqa: F401  before torch
