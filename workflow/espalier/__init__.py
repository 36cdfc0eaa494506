"""Espalier: language models through prune, tune, quantize, evaluate, profile and plot, in one Snakemake workflow."""

__version__ = "0.1.0"
