"""Modules by the names that they had before they moved: `lavender.NAME` finds them here. Each warns once."""
