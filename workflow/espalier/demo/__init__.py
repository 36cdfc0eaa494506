"""The demo's generated language: a small world of things and tools, in English-like statements and questions."""
