"""A run as data: the dataclass, the files it is read from, what differs, and the cards of its methods."""
