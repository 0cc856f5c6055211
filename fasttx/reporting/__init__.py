"""A finished run for people: `fasttx report`, and `fasttx explain` for one text."""
