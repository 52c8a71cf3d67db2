"""One sampling run, taken apart: `unmask profile`."""
