"""Statistics over few seeds."""
