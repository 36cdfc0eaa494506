"""One file a method: see docs/extending.md."""
