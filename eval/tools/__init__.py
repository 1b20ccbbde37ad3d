"""Scripts around the harness: references, conversion, self-test, house classifiers, studies, benchmarks."""
