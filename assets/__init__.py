"""Teachers, feature extractors and pictures that ship with fewstep."""
