"""A trained run behind HTTP: requests that arrive together are packed into one batch."""
