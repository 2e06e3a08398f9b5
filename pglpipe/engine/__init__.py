"""Who decides and who obeys, from the first command to the last."""
