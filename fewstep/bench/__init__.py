"""What things cost: scripts that print ratios taken in one run. Nothing imports them."""
