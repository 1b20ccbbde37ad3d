"""`fewstep compare`: recipes under one budget, measured alike and ranked."""
