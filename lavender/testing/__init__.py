"""Checks for whoever adds a family of students: what `lavender.patch` promises, and a probe of the family's grid rule."""
