"""What all Trainers share: stopping, resuming, weight average, FSDP, schedule, metrics."""
