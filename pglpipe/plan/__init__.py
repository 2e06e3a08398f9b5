"""Who holds what, from what is asked for."""
