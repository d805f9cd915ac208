"""One file a table: its columns, its title, how it is read, its figure and its sentence."""
