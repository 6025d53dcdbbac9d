"""Measures of word maps and of answers."""
