"""Position schemes, one file each; the hooks they fill are in base.py."""
