"""What trained runs are worth, side by side."""
