"""Measuring: metrics, the classifier, the tables."""
