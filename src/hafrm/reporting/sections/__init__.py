"""The parts of the page: each module turns what it knows into a section, or into None without its data."""
