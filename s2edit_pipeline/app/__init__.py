"""The web page, and the Space that shows it."""
