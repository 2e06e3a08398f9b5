"""What travels: commands, packets and reports."""
