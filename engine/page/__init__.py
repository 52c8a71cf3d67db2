"""A page of result files: one self-contained HTML file that needs no network."""
