"""Where things live: layers over stages (pure), processes over groups, randomness over ranks."""
