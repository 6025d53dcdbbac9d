"""Word maps on disk, whatever made them: the store, its upkeep, and published formats."""
