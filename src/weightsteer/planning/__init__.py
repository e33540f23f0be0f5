"""What a recipe will take, found without weights: memory, tokens, judge calls, disk, and an estimate of the time."""
