"""Networks whose features are compared, and the numbers they give by themselves."""
