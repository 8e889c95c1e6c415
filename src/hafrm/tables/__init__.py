"""What the command line shows, as rich tables and lines; nothing is computed or printed here."""
