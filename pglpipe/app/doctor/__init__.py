"""Checks machines and the network between them."""
