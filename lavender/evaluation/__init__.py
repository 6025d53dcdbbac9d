"""Measures of word maps and of answers, for any store and any student, beside their controls."""
