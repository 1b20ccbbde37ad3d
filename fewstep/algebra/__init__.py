"""Processes, predictions, times, trajectories and samplers: pure functions of tensors."""
