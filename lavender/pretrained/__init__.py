"""Models by name: of which revision they are, whose code may run, and whether their weights are whole and sound."""
