"""What steering does: tasks, measurements, sweeps over k, the choice of k, comparison at equal loss increase."""
