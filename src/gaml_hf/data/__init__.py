"""Rows of texts and classes: reading them out of files, and what is wrong with them."""
