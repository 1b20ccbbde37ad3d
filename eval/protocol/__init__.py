"""What is measured and how: presets, samples, references, the run over all of them."""
