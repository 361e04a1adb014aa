"""What every method stands on; nothing here knows a method by name."""
