"""What `leank bench` measures: decode attention alone, and whole engines side by side."""
