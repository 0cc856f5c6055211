"""Looking at a finished run: `fasttx report`, and `fasttx explain` for one text."""
