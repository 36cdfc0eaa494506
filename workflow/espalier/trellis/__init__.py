"""Trellis, a decode engine of our own: a static key-value cache, and products and attention chosen by measurement."""
