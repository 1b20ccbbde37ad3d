"""Recipes shipped with fewstep, as data; see `fewstep recipes ls`."""
