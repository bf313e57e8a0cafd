"""Floor 4: what happens to the units of an adapter while it trains."""
