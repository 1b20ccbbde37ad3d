"""Trained students as ordinary diffusers pipelines."""
