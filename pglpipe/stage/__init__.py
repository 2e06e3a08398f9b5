"""One stage: its layers, its head, its loss and its optimizer."""
