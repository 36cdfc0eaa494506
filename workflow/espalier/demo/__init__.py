"""The demo's generated language: a small world of things, in English-like statements and questions."""
