"""One trunk per file."""
