"""Thousands of fits and edits: a manifest of rows, each done once, whatever happens on the way."""
