"""Pure functions of the step."""
