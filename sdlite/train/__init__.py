"""Training: one loop, a data folder, and a task per network."""
