"""The commands of ``s2edit`` that work on pictures: a module each, and what they share."""
