"""Training with checkpoints, evaluation with intervals, records, claims and verdicts, figures and tables."""
