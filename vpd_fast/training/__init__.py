"""Training: configuration, losses, optimiser groups, schedules, frozen parts, and the loop that ties them together."""
