"""Training: settings, the stage's model, batches, trainer, crash safety, planning."""
