"""Statistics of features and distances between them."""
