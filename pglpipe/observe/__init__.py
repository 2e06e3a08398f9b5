"""What is shown and written of a run. It hears, and never decides."""
