"""The systems that edit a picture by words, behind one protocol."""
